//! Which tasks there are, and what they come to: the needle map, as tables and as a picture.

use std::fmt::Display;
use std::path::Path;

use adaptive_kvcache::eval::{Row, RulerTask, Task, TaskRow};
use adaptive_kvcache::plot::{NeedleMap, needle_maps};
use adaptive_kvcache::{Error, Result};

use super::cells::budget_text;
use crate::cli::measure::{Names, distinct};
use crate::cli::plain;

/// Stands for all of RULER's.
const RULER: &str = "ruler";

/// The tasks that the user named, each once.
pub struct Tasks {
    pub facts: Vec<Task>,
    pub ruler: Vec<RulerTask>,
}

impl Tasks {
    pub fn by_names(names: &[String]) -> Result<Self> {
        let (mut facts, mut ruler) = (Vec::new(), Vec::new());
        for name in names {
            match (Task::by_name(name), RulerTask::by_name(name)) {
                _ if name == RULER => ruler.extend(RulerTask::ALL),
                (Some(task), _) => facts.push(task),
                (_, Some(task)) => ruler.push(task),
                (None, None) => return Err(unknown(name)),
            }
        }
        Ok(Self { facts: distinct(&facts), ruler: distinct(&ruler) })
    }

    pub fn is_empty(&self) -> bool {
        self.facts.is_empty() && self.ruler.is_empty()
    }
}

fn unknown(name: &str) -> Error {
    let facts = Task::ALL.into_iter().map(Task::name);
    let names = facts.chain(RulerTask::ALL.into_iter().map(RulerTask::name)).chain([RULER]);
    let names: Vec<String> = names.map(|name| format!("`{name}`")).collect();
    Error::input(format!("unknown task `{name}`")).with_hint(format!("expected some of {}", names.join(", ")))
}

/// A map for each task and variant, of those that were measured at more than one place.
pub fn maps(rows: &[Row], names: &Names) -> Vec<NeedleMap> {
    let mut groups: Vec<Vec<&TaskRow>> = Vec::new();
    for row in rows {
        let Row::Task(row) = row else { continue };
        let case = |row: &TaskRow| (row.task, row.config.clone(), row.kv_dtype, row.budget);
        match groups.iter_mut().find(|group| case(group[0]) == case(row)) {
            Some(group) => group.push(row),
            None => groups.push(vec![row]),
        }
    }
    groups.retain(|group| group.len() > 1);
    groups.iter().map(|group| map(group, names)).collect()
}

fn map(group: &[&TaskRow], names: &Names) -> NeedleMap {
    let TaskRow { task, config, kv_dtype, budget, trials, .. } = group[0];
    let mut lengths = distinct(&group.iter().map(|row| row.context).collect::<Vec<_>>());
    let mut depths = distinct(&group.iter().map(|row| row.depth).collect::<Vec<_>>());
    lengths.sort_unstable();
    depths.sort_by(f64::total_cmp);
    let cell = |depth: f64, length: usize| {
        let row = group.iter().find(|row| row.context == length && row.depth.total_cmp(&depth).is_eq());
        row.map(|row| row.accuracy)
    };
    let budget = budget.map_or_else(String::new, |budget| format!(", {}", budget_text(Some(budget))));
    let texts = if *trials == 1 { "1 text".to_owned() } else { format!("{trials} texts") };
    NeedleMap {
        title: plain(&format!("{task}: {}{budget}, {kv_dtype}, {texts} each", names.of(config))),
        cells: depths.iter().flat_map(|&depth| lengths.iter().map(move |&length| cell(depth, length))).collect(),
        lengths,
        depths,
    }
}

/// A map in characters.
pub fn table(map: &NeedleMap) -> String {
    let row = |first: &dyn Display, cells: Vec<String>| {
        let mut line = format!("\n{first:>27}");
        for cell in cells {
            line.extend([" ".repeat(8_usize.saturating_sub(cell.len())), cell]);
        }
        line
    };
    let mut text = format!("\n{}", map.title);
    text += &row(&"right % at depth, of tokens", map.lengths.iter().map(ToString::to_string).collect());
    for (depth, cells) in map.depths.iter().zip(map.cells.chunks(map.lengths.len().max(1))) {
        let cell = |cell: &Option<f64>| cell.map_or("-".to_owned(), |share| format!("{:.0}", 100.0 * share));
        text += &row(depth, cells.iter().map(cell).collect());
    }
    text
}

/// Draws the maps.
pub fn draw(path: &Path, model: &Path, maps: &[NeedleMap]) -> Result<()> {
    if maps.is_empty() {
        return Ok(());
    }
    let model = model.file_name().unwrap_or(model.as_os_str());
    needle_maps(path, &plain(&model.to_string_lossy()), maps)
}
