//! The picture of an evaluation: divergence and accuracy against memory.

use std::path::Path;

use adaptive_kvcache::Result;
use adaptive_kvcache::eval::{AnswerRow, GivenBudget, MEAN_NAME, Row, TaskRow, mean};
use adaptive_kvcache::plot::{TradeoffLine, TradeoffPanel, TradeoffPoint, TradeoffScale, tradeoff};

use super::answers::by_setting;
use crate::cli::measure::Names;
use crate::cli::plain;

/// Draws the panels, if there are any.
pub fn draw(path: &Path, model: &Path, panels: &[TradeoffPanel]) -> Result<()> {
    if panels.is_empty() {
        return Ok(());
    }
    let model = model.file_name().unwrap_or(model.as_os_str());
    tradeoff(path, &plain(&model.to_string_lossy()), panels)
}

/// A panel for each measure of the rows.
pub fn panels(rows: &[Row], names: &Names) -> Vec<TradeoffPanel> {
    let mut panels: Vec<TradeoffPanel> = Vec::new();
    let text = |row: &Row| if let Row::Fidelity(row) = row { row.text.clone() } else { None };
    let first_text = rows.first().map(text);
    let has_several = rows.iter().any(|row| matches!(row, Row::Fidelity(_)) && Some(text(row)) != first_text);
    for row in rows {
        let Row::Fidelity(row) = row else { continue };
        let of = row.text.as_deref().filter(|_| has_several);
        let of = of.map_or_else(String::new, |text| format!(", {}", plain(Names::new(&[text.to_owned()]).of(text))));
        let title = &format!("mean KL divergence from the full cache, nats{of}");
        let (kv_bytes, error) = (as_number(row.kv_bytes), row.kl_std_error.unwrap_or(0.0));
        let point = TradeoffPoint { kv_bytes, value: row.kl_mean, error };
        let name = named(names, &row.config, row.budget, row.kv_dtype);
        add(&mut panels, title, TradeoffScale::Log, name, point);
    }
    for (row, point) in over_depths(rows) {
        let title = format!("{}, share of right answers", row.task);
        let name = named(names, &row.config, row.budget, row.kv_dtype);
        add(&mut panels, &title, TradeoffScale::Share, name, point);
    }
    // A panel for each of eleven tasks would be a very long picture.
    let has_mean = rows.iter().any(|row| matches!(row, Row::Ruler(row) if row.task == MEAN_NAME));
    for row in rows {
        let Row::Ruler(row) = row else { continue };
        if has_mean && row.task != MEAN_NAME {
            continue;
        }
        let title = format!("RULER, {}, {} tokens: score", row.task, row.context);
        let error = row.difference_95.unwrap_or(0.0);
        let point = TradeoffPoint { kv_bytes: as_number(row.kv_bytes), value: row.score, error };
        let name = named(names, &row.config, row.budget, row.kv_dtype);
        add(&mut panels, &title, TradeoffScale::Share, name, point);
    }
    for group in by_setting(rows) {
        let average = |value: fn(&AnswerRow) -> f64| mean(&group.iter().map(|row| value(row)).collect::<Vec<_>>());
        let kv_bytes = average(|row| as_number(row.kv_bytes));
        let value = average(|row| as_number(row.equal_tokens) / as_number(row.full_tokens.max(1)));
        let title = "share of the full cache's answers before the first difference";
        let point = TradeoffPoint { kv_bytes, value, error: 0.0 };
        let name = named(names, &group[0].config, group[0].budget, group[0].kv_dtype);
        add(&mut panels, title, TradeoffScale::Share, name, point);
    }
    panels
}

/// The line of a configuration: its name, whose positions compete for its budget, if that was given, and its numbers.
fn named(names: &Names, config: &str, budget: Option<GivenBudget>, kv_dtype: &str) -> String {
    let over = budget.and_then(|given| given.budget_over).map_or_else(String::new, |over| format!(" {}", over.name()));
    plain(&format!("{}{over}, {kv_dtype}", names.of(config)))
}

/// One point for each task, text length and variant: the mean over depths; with one of its rows.
fn over_depths(rows: &[Row]) -> Vec<(&TaskRow, TradeoffPoint)> {
    let mut groups: Vec<Vec<&TaskRow>> = Vec::new();
    for row in rows {
        let Row::Task(row) = row else { continue };
        let case = |row: &TaskRow| (row.task, row.config.clone(), row.context, row.kv_dtype, row.budget);
        match groups.iter_mut().find(|group| case(group[0]) == case(row)) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    let average =
        |group: &[&TaskRow], value: fn(&TaskRow) -> f64| mean(&group.iter().map(|row| value(row)).collect::<Vec<_>>());
    let mut points = Vec::with_capacity(groups.len());
    for group in groups {
        let kv_bytes = average(&group, |row| as_number(row.kv_bytes));
        let value = average(&group, |row| row.accuracy);
        points.push((group[0], TradeoffPoint { kv_bytes, value, error: 0.0 }));
    }
    points
}

#[expect(clippy::cast_precision_loss)]
fn as_number(bytes: usize) -> f64 {
    bytes as f64
}

/// Adds a point to a line in the panel of a measure; both are made if missing.
fn add(panels: &mut Vec<TradeoffPanel>, title: &str, scale: TradeoffScale, name: String, point: TradeoffPoint) {
    let index = panels.iter().position(|panel| panel.title == title).unwrap_or_else(|| {
        panels.push(TradeoffPanel { title: title.to_owned(), scale, lines: Vec::new(), limit: None, marked: None });
        panels.len() - 1
    });
    let lines = &mut panels[index].lines;
    match lines.iter_mut().find(|line| line.name == name) {
        Some(line) => line.points.push(point),
        None => lines.push(TradeoffLine { name, points: vec![point] }),
    }
}
