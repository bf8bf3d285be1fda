//! Drawing a layer's maps: header, grid, strips and axes.
//!
//! Expects inputs that [`super::layer_attention`] has checked.

use super::super::axis::{counted, index_ticks, label_gap, percent};
use super::super::canvas::{Align, Canvas};
use super::super::color::{INK, MUTED, attention_weight, hot, kept_fraction};
use super::super::text::{self, Size};
use super::HeadMap;
use super::layout::MapGrid;
use crate::error::Result;

const MARGIN: i32 = 20;
/// From a map to the strip below it.
const STRIP_GAP: i32 = 4;
const STRIP_HEIGHT: i32 = 10;
/// Baselines below the strip: tick labels, axis title, what was kept.
const TICK_LABELS: i32 = 7 + Size::Normal.digit();
const AXIS_TITLE: i32 = TICK_LABELS + 17;
const CAPTION: i32 = AXIS_TITLE + 19;
/// From the last baseline of a map to the next title.
const ROW_GAP: i32 = 26;
/// Between maps, and how far tick labels may stand out on either side of one.
const COLUMN_GAP: i32 = 24;
const OVERHANG: i32 = 6;
const TITLE_LINE: i32 = Size::Normal.line() + 3;
const MAX_TITLE_LINES: usize = 3;
/// Narrowest place for a map: room for its caption.
const MIN_PANEL: i32 = 210;
/// Narrowest picture inside its margins: room for the header.
const MIN_CONTENT: i32 = 500;
/// Room for the strip's legend.
const LEGEND_WIDTH: i32 = 380;
/// Colour bar.
const BAR: (i32, i32) = (360, 14);
const BAR_TICKS: [f32; 7] = [0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0];

/// Everything about a picture's layout.
pub(super) struct Picture {
    prompt_len: usize,
    grid: MapGrid,
    title: Vec<String>,
    notes: Vec<String>,
    /// Of every head, in lines.
    head_titles: Vec<Vec<String>>,
    /// Positions with a label, across and down.
    ticks: (Vec<usize>, Vec<usize>),
    /// Upper edges of the rows' maps, and the picture's height.
    map_tops: Vec<i32>,
    height: i32,
    /// Upper left corners of the colour bar's label and of the strip's legend.
    legends: [(i32, i32); 2],
    /// Left edge of the first map.
    left: i32,
    /// From one map's left edge to the next one's.
    pitch: i32,
    /// Width without margins and the vertical axis.
    content: i32,
}

impl Picture {
    /// Lays a picture out; `heads` are checked, and `prompt_len` is at least 1.
    pub(super) fn new(layer: usize, prompt_len: usize, heads: &[HeadMap<'_>]) -> Self {
        let grid = MapGrid::new(heads.len(), heads.first().map_or(1, |head| head.side), prompt_len);
        let map_px = grid.map_px();
        let panel = map_px.max(MIN_PANEL);
        let pitch = panel + COLUMN_GAP;
        let content = (grid.columns as i32 * pitch - COLUMN_GAP).max(MIN_CONTENT);
        let label_width = text::width(&prompt_len.saturating_sub(1).to_string(), Size::Normal);
        let left = MARGIN + Size::Normal.line() + 8 + label_width + 8;

        let tokens = counted(prompt_len, "prompt token");
        let title = format!("Layer {layer}: attention of {} over {tokens}", counted(heads.len(), "query head"));
        let title = text::wrap(&title, Size::Title, content, 3);
        let note = if grid.side == prompt_len {
            "One cell is one query position (down) and one key position (across).".to_owned()
        } else {
            let side = grid.side;
            let positions = format!("{:.1}", grid.positions_per_cell());
            let positions = positions.trim_end_matches(".0");
            format!(
                "{side} × {side} cells of about {positions} × {positions} positions, query (down) and key (across); \
                 a cell shows its largest weight."
            )
        };
        let notes = text::wrap(&note, Size::Normal, content, 4);
        let (legends, header_height) = {
            let lines = title.len() as i32 * (Size::Title.line() + 4) + notes.len() as i32 * TITLE_LINE;
            let (top, beside) = (MARGIN + lines + 12, BAR.0 + 60);
            if content >= beside + LEGEND_WIDTH {
                ([(left, top), (left + beside, top)], top + 68)
            } else {
                ([(left, top), (left, top + 58)], top + 116)
            }
        };

        let head_titles: Vec<Vec<String>> = heads
            .iter()
            .map(|head| {
                let title = format!("head {} (KV {}): {}", head.query_head, head.kv_head, head.policy);
                text::wrap(&title, Size::Normal, panel + COLUMN_GAP - 14, MAX_TITLE_LINES)
            })
            .collect();
        let mut y = header_height;
        let map_tops = head_titles
            .chunks(grid.columns)
            .map(|titles| {
                let map_top = y + titles.iter().map(Vec::len).max().unwrap_or(1) as i32 * TITLE_LINE + 4;
                y = map_top + map_px + STRIP_GAP + STRIP_HEIGHT + CAPTION + ROW_GAP;
                map_top
            })
            .collect();
        // Labels at the ends are pushed inwards by up to half their width.
        let across = index_ticks(prompt_len, map_px, label_gap(prompt_len) + label_width / 2 - OVERHANG);
        let down = index_ticks(prompt_len, map_px, (Size::Normal.line() + 6).max(map_px / 12));
        Self {
            prompt_len,
            grid,
            title,
            notes,
            head_titles,
            ticks: (across, down),
            map_tops,
            height: y - ROW_GAP + MARGIN,
            legends,
            left,
            pitch,
            content,
        }
    }

    /// Draws what [`Picture::new`] laid out; the same heads again.
    ///
    /// # Errors
    /// [`crate::error::Error::Unsupported`] if the picture would be absurdly large.
    pub(super) fn draw(&self, heads: &[HeadMap<'_>]) -> Result<Canvas> {
        let mut canvas = Canvas::new(self.left + self.content + MARGIN, self.height)?;
        self.header(&mut canvas);
        let columns = self.grid.columns;
        for (row, (heads, titles)) in heads.chunks(columns).zip(self.head_titles.chunks(columns)).enumerate() {
            let map_top = self.map_tops.get(row).copied().unwrap_or_default();
            self.vertical_axis(&mut canvas, map_top);
            for ((head, title), column) in heads.iter().zip(titles).zip(0..) {
                let x = self.left + column * self.pitch;
                // A short title stands on its map, not a line above it.
                for (line, above) in title.iter().rev().zip(0..) {
                    canvas.text(line, (x, map_top - 8 - above * TITLE_LINE), Align::Left, Size::Normal, INK);
                }
                self.map(&mut canvas, head, (x, map_top));
                self.strip(&mut canvas, head, (x, map_top + self.grid.map_px() + STRIP_GAP));
            }
        }
        Ok(canvas)
    }

    /// Title, notes, colour bar and the strip's legend.
    fn header(&self, canvas: &mut Canvas) {
        let [bar, strip] = self.legends;
        let mut y = MARGIN + Size::Title.digit();
        for line in &self.title {
            canvas.text(line, (self.left, y), Align::Left, Size::Title, INK);
            y += Size::Title.line() + 4;
        }
        for line in &self.notes {
            canvas.text(line, (self.left, y), Align::Left, Size::Normal, MUTED);
            y += TITLE_LINE;
        }

        let baseline = Size::Normal.digit();
        canvas.text(
            "attention weight (square-root colour scale)",
            (bar.0, bar.1 + baseline),
            Align::Left,
            Size::Normal,
            INK,
        );
        let bar_top = bar.1 + baseline + 7;
        for column in 0..BAR.0 {
            let color = hot(column as f32 / (BAR.0 - 1) as f32);
            canvas.fill((bar.0 + column, bar_top), (1, BAR.1), color);
        }
        canvas.frame((bar.0, bar_top), BAR, MUTED);
        for weight in BAR_TICKS {
            let x = bar.0 + (weight.sqrt() * (BAR.0 - 1) as f32).round() as i32;
            canvas.fill((x, bar_top + BAR.1 + 1), (1, 4), INK);
            let label = (x, bar_top + BAR.1 + 8 + baseline);
            canvas.text(&weight.to_string(), label, Align::Center, Size::Normal, MUTED);
        }

        canvas.text(
            "strip below a map: keys its KV head kept",
            (strip.0, strip.1 + baseline),
            Align::Left,
            Size::Normal,
            INK,
        );
        let whole = [("evicted", 0.0), ("kept", 1.0)];
        let parts = [("none", 0.0), ("25 %", 0.25), ("50 %", 0.5), ("100 % of a cell's positions", 1.0)];
        let entries = if self.grid.side == self.prompt_len { &whole[..] } else { &parts[..] };
        let swatch_top = strip.1 + baseline + 7;
        let mut x = strip.0 + 1;
        for &(label, fraction) in entries {
            canvas.fill((x, swatch_top), (BAR.1, BAR.1), kept_fraction(fraction));
            canvas.frame((x, swatch_top), (BAR.1, BAR.1), MUTED);
            x += BAR.1 + 6;
            canvas.text(label, (x, swatch_top + BAR.1 - 3), Align::Left, Size::Normal, MUTED);
            x += text::width(label, Size::Normal) + 18;
        }
    }

    /// A map's cells in their colours, framed.
    fn map(&self, canvas: &mut Canvas, head: &HeadMap<'_>, corner: (i32, i32)) {
        let cell_px = self.grid.cell_px;
        let mut pixels = Vec::with_capacity((self.grid.side * cell_px).pow(2) * 3);
        for row in self.grid.drawn_cells(head.cells).chunks(self.grid.side) {
            let line: Vec<u8> = row.iter().flat_map(|&weight| attention_weight(weight).repeat(cell_px)).collect();
            (0..cell_px).for_each(|_| pixels.extend_from_slice(&line));
        }
        let map_px = self.grid.map_px();
        canvas.blit(corner, (map_px, map_px), &pixels);
        canvas.frame(corner, (map_px, map_px), MUTED);
    }

    /// The strip of kept positions, and below it the horizontal axis and how many were kept.
    fn strip(&self, canvas: &mut Canvas, head: &HeadMap<'_>, (x, y): (i32, i32)) {
        const AXIS: &str = "key position";
        let cell_px = self.grid.cell_px as i32;
        for (fraction, column) in self.grid.kept_fractions(head.kept).into_iter().zip(0..) {
            canvas.fill((x + column * cell_px, y), (cell_px, STRIP_HEIGHT), kept_fraction(fraction));
        }
        let map_px = self.grid.map_px();
        canvas.frame((x, y), (map_px, STRIP_HEIGHT), MUTED);
        let bottom = y + STRIP_HEIGHT;
        for &position in &self.ticks.0 {
            let middle = x + self.grid.middle_of(position);
            canvas.fill((middle, bottom + 1), (1, 4), INK);
            let label = position.to_string();
            let half = text::width(&label, Size::Normal) / 2 - OVERHANG;
            let center = middle.min(x + map_px - half).max(x + half);
            canvas.text(&label, (center, bottom + TICK_LABELS), Align::Center, Size::Normal, MUTED);
        }
        let middle = x + (map_px / 2).max(text::width(AXIS, Size::Normal) / 2);
        canvas.text(AXIS, (middle, bottom + AXIS_TITLE), Align::Center, Size::Normal, MUTED);
        let share = percent(head.kept.len() as f64, self.prompt_len as f64);
        let caption = format!("kept {} of {} ({share})", head.kept.len(), self.prompt_len);
        let caption = text::shorten(&caption, Size::Normal, self.pitch);
        canvas.text(&caption, (x, bottom + CAPTION), Align::Left, Size::Normal, INK);
    }

    /// Ticks and title to the left of a row's first map.
    fn vertical_axis(&self, canvas: &mut Canvas, y: i32) {
        let x = self.left;
        for &position in &self.ticks.1 {
            let middle = y + self.grid.middle_of(position);
            canvas.fill((x - 5, middle), (4, 1), INK);
            let label = (x - 8, middle + Size::Normal.digit() / 2 + 1);
            canvas.text(&position.to_string(), label, Align::Right, Size::Normal, MUTED);
        }
        let title = (MARGIN + Size::Normal.digit(), y + self.grid.map_px() / 2);
        canvas.text_upwards("query position", title, Size::Normal, MUTED);
    }
}
