//! Bisection of steps by whether they satisfy a condition. Not for: what the condition is.

use crate::error::Result;

/// Which of the steps that satisfy the condition is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The lowest: those above it are expected to satisfy it too.
    Lowest,
    /// The highest: those below it are expected to satisfy it too.
    Highest,
}

/// Tries steps of `0..=last`, each once at most: the highest first, then the middle of what is left, until the wanted
/// one and its neighbour that does not satisfy the condition were tried. If the highest decides it, no other is tried.
///
/// * `satisfies`: tries a step, and says whether it satisfies the condition, or `None` to try no more; where the
///   expectation of [`Wanted`] does not hold, a step that satisfies may be found that is not the wanted one
///
/// # Errors
/// Whatever `satisfies` fails with.
pub(super) fn bisect(
    last: usize,
    wanted: Wanted,
    satisfies: &mut dyn FnMut(usize) -> Result<Option<bool>>,
) -> Result<()> {
    let Some(top) = satisfies(last)? else { return Ok(()) };
    // Nothing below can satisfy it, or nothing below is better.
    if top != (wanted == Wanted::Lowest) {
        return Ok(());
    }
    // Steps from `low` up to but not including `high` are open; `high` is as the highest.
    let (mut low, mut high) = (0, last);
    while low < high {
        let middle = low.midpoint(high);
        match satisfies(middle)? {
            None => break,
            Some(same) if same == top => high = middle,
            Some(_) => low = middle + 1,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    /// Steps in the order in which they were tried.
    fn tried(last: usize, wanted: Wanted, satisfies: impl Fn(usize) -> bool) -> Vec<usize> {
        let mut tried = Vec::new();
        bisect(last, wanted, &mut |step| {
            tried.push(step);
            Ok(Some(satisfies(step)))
        })
        .unwrap();
        tried
    }

    #[test]
    fn the_wanted_step_and_its_neighbour_are_tried_wherever_they_lie() {
        for last in [0usize, 1, 2, 3, 9, 200] {
            let log = usize::BITS as usize - last.leading_zeros() as usize;
            for bound in 0..=last {
                let lowest = tried(last, Wanted::Lowest, |step| step >= bound);
                let highest = tried(last, Wanted::Highest, |step| step <= bound);
                for (steps, neighbour) in [(&lowest, bound.checked_sub(1)), (&highest, Some(bound + 1))] {
                    assert!(steps.contains(&bound), "{bound} of {last}: {steps:?}");
                    assert!(neighbour.is_none_or(|next| next > last || steps.contains(&next)), "{bound}: {steps:?}");
                    assert!(steps.len() <= log + 2, "{bound} of {last}: {steps:?}");
                    let mut distinct = steps.clone();
                    distinct.sort_unstable();
                    distinct.dedup();
                    assert_eq!(distinct.len(), steps.len(), "{steps:?}");
                }
            }
        }
    }

    #[test]
    fn the_highest_step_decides_alone_where_it_can() {
        assert_eq!(tried(200, Wanted::Lowest, |_| false), [200]);
        assert_eq!(tried(200, Wanted::Highest, |_| true), [200]);
        // No step satisfies: the lowest is among those that were tried.
        assert_eq!(tried(7, Wanted::Highest, |_| false), [7, 3, 1, 0]);
    }

    #[test]
    fn no_more_is_tried_when_it_is_enough() {
        for enough in 1..5 {
            let mut count = 0;
            bisect(200, Wanted::Lowest, &mut |_| {
                count += 1;
                Ok((count < enough).then_some(true))
            })
            .unwrap();
            assert_eq!(count, enough);
        }
    }

    #[test]
    fn a_failure_ends_the_search() {
        let mut count = 0;
        let result = bisect(200, Wanted::Lowest, &mut |_| {
            count += 1;
            if count == 2 { Err(Error::Interrupted) } else { Ok(Some(true)) }
        });
        assert!(matches!(result, Err(Error::Interrupted)));
        assert_eq!(count, 2);
    }
}
