//! Colours: the `hot` map for attention weights, the shades of the strip of kept positions, a palette for policies.

/// Red, green, blue in 0..=255.
pub(super) type Rgb = [u8; 3];

/// Text, frames and axes.
pub(super) const INK: Rgb = [34, 34, 34];
/// Text that explains, and ticks.
pub(super) const MUTED: Rgb = [95, 95, 95];
/// Grid lines.
pub(super) const FAINT: Rgb = [222, 222, 222];
/// Paper.
pub(super) const WHITE: Rgb = [255, 255, 255];
/// What was there before eviction.
pub(super) const RAW: Rgb = [176, 176, 176];
/// What was kept.
pub(super) const KEPT: Rgb = [0, 114, 178];

/// Black, red, yellow, white for `value` 0 to 1, with matplotlib's corner points of `hot`.
///
/// Values outside 0..=1 take the nearer end; NaN is black.
pub(super) fn hot(value: f32) -> Rgb {
    const RED_FULL: f32 = 0.365_079;
    const GREEN_FULL: f32 = 0.746_032;
    let value = if value.is_nan() { 0.0 } else { value.clamp(0.0, 1.0) };
    let ramp =
        |from: f32, start: f32, end: f32| from + (1.0 - from) * ((value - start) / (end - start)).clamp(0.0, 1.0);
    [ramp(0.0416, 0.0, RED_FULL), ramp(0.0, RED_FULL, GREEN_FULL), ramp(0.0, GREEN_FULL, 1.0)]
        .map(|channel| (channel * 255.0).round() as u8)
}

/// [`hot`] on a square-root scale: attention weights are heavy-tailed, and a linear scale would hide all but sinks.
pub(super) fn attention_weight(weight: f32) -> Rgb {
    hot(weight.max(0.0).sqrt())
}

/// Shade for a strip cell of which a fraction in 0..=1 of the positions is kept.
///
/// A cell with any kept position is visibly other than an empty one.
pub(super) fn kept_fraction(fraction: f32) -> Rgb {
    const NONE: Rgb = [236, 236, 236];
    const LEAST_VISIBLE: f32 = 0.22;
    if fraction > 0.0 { mix(NONE, KEPT, LEAST_VISIBLE + (1.0 - LEAST_VISIBLE) * fraction.min(1.0)) } else { NONE }
}

/// Colour of a policy level. The first eight are Okabe and Ito's, which people with any colour vision tell apart; more
/// levels take darker shades of them, and after 16 the colours repeat.
pub(super) fn level(index: usize) -> Rgb {
    const OKABE_ITO: [Rgb; 8] = [
        [86, 180, 233],
        [230, 159, 0],
        [0, 158, 115],
        [204, 121, 167],
        [213, 94, 0],
        [0, 114, 178],
        [240, 228, 66],
        [150, 150, 150],
    ];
    let color = OKABE_ITO[index % OKABE_ITO.len()];
    if (index / OKABE_ITO.len()).is_multiple_of(2) { color } else { mix(color, [0, 0, 0], 0.5) }
}

/// Black or white, whichever is easier to read on `background`.
pub(super) fn text_on(background: Rgb) -> Rgb {
    // Relative luminance at which black and white have the same WCAG contrast.
    if luminance(background) > 0.179 { [0, 0, 0] } else { WHITE }
}

/// Relative luminance of an sRGB colour, in 0..=1.
fn luminance(color: Rgb) -> f32 {
    let [red, green, blue] = color.map(|channel| {
        let value = f32::from(channel) / 255.0;
        if value <= 0.040_45 { value / 12.92 } else { ((value + 0.055) / 1.055).powf(2.4) }
    });
    0.2126 * red + 0.7152 * green + 0.0722 * blue
}

/// The colour a fraction `share` in 0..=1 of the way from `from` to `to`.
pub(super) fn mix(from: Rgb, to: Rgb, share: f32) -> Rgb {
    std::array::from_fn(|channel| {
        let (start, end) = (f32::from(from[channel]), f32::from(to[channel]));
        (start + (end - start) * share).round() as u8
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hot_grows_from_black_to_white() {
        let steps: Vec<Rgb> = (0..=1000_u16).map(|step| hot(f32::from(step) / 1000.0)).collect();
        for pair in steps.windows(2) {
            assert!(luminance(pair[0]) <= luminance(pair[1]));
            assert!((0..3).all(|channel| pair[0][channel] <= pair[1][channel]));
        }
        assert_eq!((steps[0], steps[1000]), ([11, 0, 0], WHITE));
        assert_eq!((hot(0.365_079), hot(0.746_032)), ([255, 0, 0], [255, 255, 0]));
    }

    #[test]
    fn odd_values_have_a_colour() {
        assert_eq!(hot(f32::NAN), hot(0.0));
        assert_eq!(attention_weight(f32::NAN), hot(0.0));
        assert_eq!(attention_weight(-1.0), hot(0.0));
        assert_eq!(attention_weight(f32::INFINITY), WHITE);
        assert_eq!(attention_weight(0.25), hot(0.5));
    }

    #[test]
    fn kept_shades_darken_and_never_pass_for_empty() {
        let shades: Vec<f32> = (0..=50_u8).map(|step| luminance(kept_fraction(f32::from(step) / 50.0))).collect();
        assert!(shades.windows(2).all(|pair| pair[0] > pair[1]));
        assert!(luminance(kept_fraction(0.0)) - luminance(kept_fraction(0.001)) > 0.1);
        assert_eq!(kept_fraction(1.0), KEPT);
    }

    #[test]
    fn levels_differ_and_carry_readable_text() {
        let colors: Vec<Rgb> = (0..16).map(level).collect();
        for (index, &color) in colors.iter().enumerate() {
            assert!(!colors[..index].contains(&color));
            let (paper, ink) = (luminance(color), luminance(text_on(color)));
            assert!((paper.max(ink) + 0.05) / (paper.min(ink) + 0.05) >= 4.5, "level {index}");
        }
        assert_eq!(level(16), level(0));
    }
}
