//! Round numbers for axes, and numbers of bytes and shares as text.

use super::text::{self, Size};

/// Bytes of one MB in this program's pictures and tables.
pub(super) const MB: f64 = 1024.0 * 1024.0;

/// Positions or indices to mark on an axis of `len` of them (0 to `len - 1`) over `pixels` pixels, ascending.
///
/// 0, multiples of 1, 2 or 5 times a power of ten, and always the last one; no two closer than `min_gap` pixels, unless
/// the axis is too short for even two.
pub(super) fn index_ticks(len: usize, pixels: i32, min_gap: i32) -> Vec<usize> {
    let Some(last) = len.checked_sub(1) else { return Vec::new() };
    if last == 0 {
        return vec![0];
    }
    let pixels_per_index = f64::from(pixels.max(1)) / len as f64;
    let fits = |step: usize| step as f64 * pixels_per_index >= f64::from(min_gap);
    let mut step = 1;
    while !fits(step) && step < last {
        // 1, 2, 5, 10, 20, 50, ...
        let leading = step / 10_usize.pow(step.ilog10());
        step = step.saturating_mul(if leading == 2 { 5 } else { 4 }) / 2;
    }
    let mut ticks: Vec<usize> = (0..last).step_by(step).take_while(|&tick| tick == 0 || fits(last - tick)).collect();
    ticks.push(last);
    ticks
}

/// Space between the centres of labels on a horizontal axis of `len` indices, in pixels: the widest and some air.
pub(super) fn label_gap(len: usize) -> i32 {
    text::width(&len.saturating_sub(1).to_string(), Size::Normal) + 10
}

/// Values to mark on an axis from 0 to at least `max`, ascending, about six of them; with the decimals they need.
///
/// The last tick is not below `max`. A `max` that is not positive and finite counts as 1.
pub(super) fn value_ticks(max: f64) -> (Vec<f64>, usize) {
    let max = if max.is_finite() && max > 0.0 { max } else { 1.0 };
    let power = (max / 5.0).log10().floor();
    let unit = 10_f64.powf(power);
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * unit * 5.0 >= max * 0.999).unwrap_or(10.0);
    let exponent = if factor > 9.0 { power + 1.0 } else { power };
    let step = factor * unit;
    let count = (max / step - 1e-6).ceil().max(1.0) as u32;
    ((0..=count).map(|index| f64::from(index) * step).collect(), (-exponent).max(0.0) as usize)
}

/// A vertical axis.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Axis {
    /// Heights in 0..=1 and labels, from below.
    pub ticks: Vec<(f64, String)>,
    scale: Scale,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Scale {
    /// From 0 to this.
    Linear(f64),
    /// Between these powers of ten; what has no logarithm lies at the foot.
    Logarithmic(f64, f64),
}

/// The most decades of a logarithmic axis; what is smaller lies at its foot.
const MAX_DECADES: i32 = 12;

impl Axis {
    /// From 0 to a round number that is not below `max`.
    pub fn linear(max: f64) -> Self {
        let (ticks, decimals) = value_ticks(max);
        let full_scale = ticks.last().copied().unwrap_or(1.0);
        let ticks = ticks.into_iter().map(|tick| (tick / full_scale, format!("{tick:.decimals$}")));
        Self { ticks: ticks.collect(), scale: Scale::Linear(full_scale) }
    }

    /// Powers of ten; if there are values that have no logarithm, one more decade, below the others, for them.
    ///
    /// * `highest`: what it has room for beside the values
    pub fn logarithmic(values: impl Iterator<Item = f64> + Clone, highest: impl Iterator<Item = f64>) -> Self {
        let is_positive = |value: &f64| value.is_finite() && *value > 0.0;
        let has_zero = values.clone().any(|value| !is_positive(&value));
        let lowest = values.filter(is_positive).fold(f64::INFINITY, f64::min);
        let (mut low, mut high) = (-1, 0);
        if lowest.is_finite() {
            high = highest.filter(is_positive).fold(f64::MIN_POSITIVE, f64::max).log10().ceil() as i32;
            low = (lowest.log10().floor() as i32).min(high - 1).max(high - MAX_DECADES);
        }
        let foot = f64::from(low) - f64::from(u8::from(has_zero));
        let mut axis = Self { ticks: Vec::new(), scale: Scale::Logarithmic(foot, f64::from(high)) };
        let zero = has_zero.then(|| (0.0, "0".to_owned()));
        let powers = (low..=high).map(|power| (axis.height(10_f64.powi(power)), decimal(power)));
        axis.ticks = zero.into_iter().chain(powers).collect();
        axis
    }

    /// Where a value lies, from 0 at the foot to 1 at the top.
    pub fn height(&self, value: f64) -> f64 {
        let height = match self.scale {
            Scale::Linear(full_scale) => value / full_scale,
            Scale::Logarithmic(low, high) if value > 0.0 => (value.log10() - low) / (high - low),
            Scale::Logarithmic(..) => 0.0,
        };
        if height.is_finite() { height.clamp(0.0, 1.0) } else { 0.0 }
    }
}

/// A power of ten, as people write it.
fn decimal(power: i32) -> String {
    let decimals = (-power).clamp(0, 4) as usize;
    if (-4..=4).contains(&power) { format!("{:.decimals$}", 10_f64.powi(power)) } else { format!("1e{power}") }
}

/// A number of bytes in MB with about three significant digits, such as `12.3 MB` or `0.00309 MB`.
pub(super) fn megabytes(bytes: f64) -> String {
    let value = bytes / MB;
    let decimals = if value > 0.0 { (2.0 - value.log10().floor()).clamp(0.0, 9.0) as usize } else { 0 };
    format!("{value:.decimals$} MB")
}

/// `part / whole` in percent with one decimal, such as `45.2 %`; `0.0 %` of nothing.
pub(super) fn percent(part: f64, whole: f64) -> String {
    let share = if whole > 0.0 { 100.0 * part / whole } else { 0.0 };
    format!("{share:.1} %")
}

/// `1 head`, `2 heads`.
pub(super) fn counted(count: usize, noun: &str) -> String {
    format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn index_ticks_hold_both_ends_and_their_distance() {
        for len in [1, 2, 3, 9, 10, 11, 99, 100, 345, 2000, 2001, 131_072] {
            for pixels in [1, 24, 200, 256, 1000] {
                let ticks = index_ticks(len, pixels, 30);
                assert_eq!((ticks[0], ticks[ticks.len() - 1]), (0, len - 1));
                let distance = |pair: &[usize]| (pair[1] - pair[0]) as f64 * f64::from(pixels) / len as f64;
                assert!(ticks.len() <= 2 || ticks.windows(2).all(|pair| distance(pair) >= 30.0), "{len} {ticks:?}");
            }
        }
        assert_eq!(index_ticks(9, 216, 24), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(index_ticks(345, 256, 30), [0, 50, 100, 150, 200, 250, 300, 344]);
        assert_eq!(index_ticks(2000, 256, 48), [0, 500, 1000, 1500, 1999]);
        assert!(index_ticks(0, 100, 30).is_empty());
    }

    #[test]
    fn value_ticks_reach_the_maximum_and_print_exactly() {
        for max in [1e-6, 0.000_7, 0.003, 0.02, 0.1, 0.3, 1.0, 1.9, 2.0, 7.0, 10.0, 99.0, 512.0, 1e5] {
            let (ticks, decimals) = value_ticks(max);
            assert!((4..=11).contains(&ticks.len()), "{max}: {ticks:?}");
            assert!(ticks[0] == 0.0 && ticks[ticks.len() - 1] >= max * 0.999_99);
            for tick in ticks {
                let printed: f64 = format!("{tick:.decimals$}").parse().unwrap();
                assert!((printed - tick).abs() < 1e-9 * max.max(1e-9), "{max}: {tick} with {decimals} decimals");
            }
        }
        for odd in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert_eq!(value_ticks(odd), value_ticks(1.0));
        }
    }

    #[test]
    fn numbers_are_readable_at_every_size() {
        assert_eq!(megabytes(0.0), "0 MB");
        assert_eq!(megabytes(3240.0), "0.00309 MB");
        assert_eq!(megabytes(12.34 * MB), "12.3 MB");
        assert_eq!(megabytes(1234.5 * MB), "1234 MB");
        assert_eq!(percent(1.0, 3.0), "33.3 %");
        assert_eq!(percent(-1.0, 0.0), "0.0 %");
        assert_eq!((counted(1, "head"), counted(2, "head")), ("1 head".to_owned(), "2 heads".to_owned()));
    }
}
