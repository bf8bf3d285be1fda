//! A picture in memory: rectangles, lines, pixel blocks and text through plotters' bitmap backend, saved as PNG.
//!
//! Not for deciding where anything goes: that is each plot's own work.

use std::io;
use std::path::Path;

use plotters::backend::{BitMapBackend, DrawingBackend, RGBPixel};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, FontTransform, RGBColor, TextStyle};

use super::color::{Rgb, mix};
use super::text::{self, Size};
use crate::error::{Error, Result};

/// Largest picture, in pixels: far above any sensible plot, far below what plotters' 32-bit sizes hold.
const MAX_PIXELS: i64 = 200_000_000;

/// Most layers, heads or the like in one picture: sums of their pixels stay far below `i32::MAX`.
const MAX_ITEMS: usize = 20_000;

/// Refuses a picture of more things than [`Canvas`] has room for.
///
/// # Errors
/// [`Error::Unsupported`], naming `what` (a plural).
pub(super) fn check_count(count: usize, what: &str) -> Result<()> {
    if count > MAX_ITEMS { Err(Error::unsupported(format!("a picture of {count} {what}"))) } else { Ok(()) }
}

/// Where a text's anchor point lies on it, from left to right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Align {
    Left,
    Center,
    Right,
}

/// A white picture to draw on; pixel (0, 0) is top left, and what lies outside is cut off.
///
/// Drawing never fails at the call: the first failure is kept and comes out of [`save`](Self::save).
#[derive(Debug)]
pub(super) struct Canvas {
    pixels: Vec<u8>, // [height, width, 3]
    size: (u32, u32),
    failure: Option<String>,
}

impl Canvas {
    /// Makes a white picture.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the size is not positive or larger than any plot should be.
    pub(super) fn new(width: i32, height: i32) -> Result<Self> {
        let num_pixels = i64::from(width) * i64::from(height);
        match (u32::try_from(width), u32::try_from(height)) {
            (Ok(w), Ok(h)) if (1..=MAX_PIXELS).contains(&num_pixels) => {
                Ok(Self { pixels: vec![255; num_pixels as usize * 3], size: (w, h), failure: None })
            }
            _ => Err(Error::unsupported(format!("a picture of {width} x {height} pixels"))),
        }
    }

    /// How many pixels have exactly this colour.
    #[cfg(test)]
    pub(super) fn count(&self, color: Rgb) -> usize {
        self.pixels.chunks_exact(3).filter(|pixel| *pixel == color).count()
    }

    /// Fills a rectangle.
    pub(super) fn fill(&mut self, (x, y): (i32, i32), (width, height): (i32, i32), color: Rgb) {
        let color = rgb(color).filled();
        self.draw(|backend| backend.draw_rect((x, y), (x + width.max(0), y + height.max(0)), &color, true));
    }

    /// Draws a frame of one pixel just outside a rectangle.
    pub(super) fn frame(&mut self, (x, y): (i32, i32), (width, height): (i32, i32), color: Rgb) {
        self.fill((x - 1, y - 1), (width + 2, 1), color);
        self.fill((x - 1, y + height), (width + 2, 1), color);
        self.fill((x - 1, y), (1, height), color);
        self.fill((x + width, y), (1, height), color);
    }

    /// Draws a straight line with round ends; coordinates are those of pixel corners, and edges are smooth.
    pub(super) fn line(&mut self, from: (f64, f64), to: (f64, f64), width: f64, color: Rgb) {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let squared = (dx * dx + dy * dy).max(f64::MIN_POSITIVE);
        let reach = width / 2.0 + 1.0;
        let pixels = |low: f64, high: f64, side: u32| {
            (low - reach).floor().clamp(0.0, f64::from(side)) as u32
                ..(high + reach).ceil().clamp(0.0, f64::from(side)) as u32
        };
        for row in pixels(from.1.min(to.1), from.1.max(to.1), self.size.1) {
            for column in pixels(from.0.min(to.0), from.0.max(to.0), self.size.0) {
                let (x, y) = (f64::from(column) + 0.5 - from.0, f64::from(row) + 0.5 - from.1);
                let along = ((x * dx + y * dy) / squared).clamp(0.0, 1.0);
                let distance = (x - along * dx).hypot(y - along * dy);
                let cover = (width / 2.0 + 0.5 - distance).clamp(0.0, 1.0) as f32;
                let at = (row as usize * self.size.0 as usize + column as usize) * 3;
                if let Some(pixel) = self.pixels.get_mut(at..at + 3) {
                    let paper = [pixel[0], pixel[1], pixel[2]];
                    pixel.copy_from_slice(&mix(paper, color, cover));
                }
            }
        }
    }

    /// Copies a block of pixels, `[height, width, 3]`; one that does not lie inside the picture counts as a failure.
    pub(super) fn blit(&mut self, (x, y): (i32, i32), (width, height): (i32, i32), pixels: &[u8]) {
        let inside = x >= 0 && y >= 0 && x + width <= self.size.0 as i32 && y + height <= self.size.1 as i32;
        if !inside || width < 1 || height < 1 || pixels.len() != (width * height * 3) as usize {
            self.failure.get_or_insert_with(|| "a block of pixels does not fit".to_owned());
            return;
        }
        self.draw(|backend| backend.blit_bitmap((x, y), (width as u32, height as u32), pixels));
    }

    /// Writes a line of text whose baseline lies at `y`.
    pub(super) fn text(&mut self, text: &str, (x, y): (i32, i32), align: Align, size: Size, color: Rgb) {
        let style = style(align, size, color);
        self.draw(|backend| backend.draw_text(text, &style, (x, y - size.line() / 2)));
    }

    /// Writes a line of text from bottom to top, centred on `y`, with its baseline at `x`.
    pub(super) fn text_upwards(&mut self, text: &str, (x, y): (i32, i32), size: Size, color: Rgb) {
        let style = style(Align::Center, size, color).transform(FontTransform::Rotate270);
        self.draw(|backend| backend.draw_text(text, &style, (x - size.line() / 2, y)));
    }

    /// Writes the picture as a PNG file, whatever its name, as [`crate::files::replace`] does.
    ///
    /// # Errors
    /// [`Error::Io`] with `path` if it cannot be written (an existing file is then as it was), or if drawing failed.
    pub(super) fn save(mut self, path: &Path) -> Result<()> {
        if let Some(failure) = self.failure.take() {
            return Err(Error::io("draw", path, io::Error::other(failure)));
        }
        let encoded = self.encode().map_err(|error| Error::io("draw", path, error.into()))?;
        crate::files::replace(path, &encoded)
    }

    /// The picture as the content of a PNG file.
    fn encode(&self) -> std::result::Result<Vec<u8>, png::EncodingError> {
        let mut content = Vec::new();
        let mut encoder = png::Encoder::new(&mut content, self.size.0, self.size.1);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        // Of drawings, whose rows are much alike, the default makes larger files.
        encoder.set_adaptive_filter(png::AdaptiveFilterType::Adaptive);
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        writer.finish()?;
        Ok(content)
    }

    fn draw<E: std::fmt::Display>(
        &mut self,
        action: impl FnOnce(&mut BitMapBackend<'_, RGBPixel>) -> std::result::Result<(), E>,
    ) {
        let result = match BitMapBackend::<RGBPixel>::with_buffer_and_format(&mut self.pixels, self.size) {
            Ok(mut backend) => action(&mut backend).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let Err(error) = result {
            self.failure.get_or_insert(error);
        }
    }
}

fn rgb([red, green, blue]: Rgb) -> RGBColor {
    RGBColor(red, green, blue)
}

fn style(align: Align, size: Size, color: Rgb) -> TextStyle<'static> {
    let h_pos = match align {
        Align::Left => HPos::Left,
        Align::Center => HPos::Center,
        Align::Right => HPos::Right,
    };
    text::font(size).color(&rgb(color)).pos(Pos::new(h_pos, VPos::Top))
}

#[cfg(test)]
mod tests {
    use super::super::color::INK;
    use super::super::test_png;
    use super::*;

    #[test]
    fn a_picture_has_its_size_and_leaves_no_other_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        for width in [30, 41] {
            let mut canvas = Canvas::new(width, 20).unwrap();
            canvas.fill((-5, 3), (10, 200), INK);
            canvas.blit((28, 18), (2, 2), &[7; 12]);
            canvas.text("cut off at the border", (2, 12), Align::Left, Size::Normal, INK);
            canvas.save(&path).unwrap();
            assert_eq!(test_png::size(&path), Some((width as u32, 20)));
        }
        assert_eq!(test_png::names(folder.path()), ["a.png"]);
    }

    #[test]
    fn text_is_drawn_where_it_is_asked_for() {
        let mut canvas = Canvas::new(60, 60).unwrap();
        canvas.text("HH", (30, 40), Align::Center, Size::Title, INK);
        let dark: Vec<usize> =
            canvas.pixels.chunks(3).enumerate().filter(|(_, rgb)| rgb[0] < 200).map(|(index, _)| index).collect();
        let (left, right) = (dark.iter().map(|i| i % 60).min().unwrap(), dark.iter().map(|i| i % 60).max().unwrap());
        assert_eq!((dark[0] / 60, dark[dark.len() - 1] / 60), (40 - Size::Title.digit() as usize, 39));
        assert!(left.abs_diff(60 - right) <= 2, "{left}..={right}");
    }

    #[test]
    fn a_line_has_its_width_and_smooth_edges() {
        let mut canvas = Canvas::new(20, 10).unwrap();
        canvas.line((3.0, 5.0), (30.0, 5.0), 2.0, [0, 0, 0]);
        let column = |x: usize| (0..10).map(|y| canvas.pixels[(y * 20 + x) * 3]).collect::<Vec<u8>>();
        assert_eq!(column(10), [255, 255, 255, 255, 0, 0, 255, 255, 255, 255]);
        assert_eq!(column(0), [255; 10]);
        let mut canvas = Canvas::new(10, 10).unwrap();
        canvas.line((5.0, 5.0), (5.0, 5.0), 6.0, [0, 0, 0]); // a point becomes a disc
        let ink: f64 = canvas.pixels.chunks(3).map(|pixel| 1.0 - f64::from(pixel[0]) / 255.0).sum();
        assert!((ink - 9.0 * std::f64::consts::PI).abs() < 1.0, "{ink}");
    }

    #[test]
    fn a_frame_lies_outside_its_rectangle() {
        let mut canvas = Canvas::new(5, 5).unwrap();
        canvas.frame((1, 1), (3, 3), [0, 0, 0]);
        for (index, pixel) in canvas.pixels.chunks(3).enumerate() {
            let inside = (1..4).contains(&(index % 5)) && (1..4).contains(&(index / 5));
            assert_eq!(pixel == [255; 3], inside);
        }
    }

    #[test]
    fn failures_name_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "x").unwrap();
        for path in [folder.path().join("none").join("a.png"), file.join("a.png")] {
            let error = Canvas::new(4, 4).unwrap().save(&path).unwrap_err();
            assert!(matches!(&error, Error::Io { path: named, .. } if *named == path));
            assert!(error.to_string().starts_with(&format!("failed to write `{}`: ", path.display())), "{error}");
        }
        // The destination is a folder: the rename fails, and the temporary file goes.
        let taken = folder.path().join("taken.png");
        std::fs::create_dir(&taken).unwrap();
        assert!(Canvas::new(4, 4).unwrap().save(&taken).is_err());
        assert!(Canvas::new(4, 4).unwrap().save(Path::new("..")).is_err());
        assert_eq!(test_png::names(folder.path()).len(), 2);
    }

    #[test]
    fn sizes_and_blocks_that_make_no_sense_are_errors() {
        for size in [(0, 4), (4, -1), (i32::MAX, i32::MAX)] {
            assert!(matches!(Canvas::new(size.0, size.1), Err(Error::Unsupported { .. })));
        }
        let mut canvas = Canvas::new(4, 4).unwrap();
        canvas.blit((3, 3), (2, 2), &[0; 12]);
        assert!(canvas.save(Path::new("/nowhere/a.png")).unwrap_err().to_string().contains("does not fit"));
    }
}
