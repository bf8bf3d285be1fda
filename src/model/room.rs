//! Room for tokens to come, where a sequence has reached its budget or the end of the context.

use super::{Llama, Model, PrefillObserver, PrefillOptions, anew};
use crate::backend::Backend;
use crate::cache::{AdaptiveKvCache, Bounds, Overflow, Retention};
use crate::compress::budget::candidates::select;
use crate::compress::{Allocation, Candidates, Safe};
use crate::error::{Error, Result};

/// Of the context, the share that any head may hold after rows have moved together, as a divisor.
const MOVED_SHARE: usize = 2;

/// Tokens that there is room for once a sequence was cut back, unless its budget is small.
const LEAST_AHEAD: usize = 64;

/// Tokens that may come at once beyond those that are announced: guesses.
const RUN: usize = 8;

impl Llama {
    /// How many tokens may come before [`make_room`](Self::make_room) has something to do, or, where that can't help, before
    /// the sequence is full.
    #[must_use]
    pub fn room(&self, cache: &AdaptiveKvCache) -> usize {
        self.config().context_length.saturating_sub(cache.seen()).min(cache.room())
    }

    /// Whether a sequence can go on, now or after [`make_room`](Self::make_room), as far as the context says.
    ///
    /// * `ahead`: of the tokens that the cache holds, how many are not part of the sequence yet
    #[must_use]
    pub fn goes_on(&self, cache: &AdaptiveKvCache, ahead: usize) -> bool {
        cache.seen() - ahead < self.config().context_length || cache.bounds().overflow == Overflow::Shift
    }

    /// Makes room for tokens to come within the sequence's budget and the model's context, if there is too little.
    ///
    /// Where the [budget in bytes](crate::compress::Budget::Bytes) is reached, the tokens that were generated since the last
    /// prompt are read once more, as a prompt: so they are scored as any other, and judged together with all that is held. If
    /// there are none, the lowest scores of what is held go.
    /// At the end of the context, [`Overflow`] says what happens; nothing, if it is to stop there.
    ///
    /// * `tokens`: that are to come, at least 1
    ///
    /// # Errors
    /// [`Error::Input`] if the budget is too small for a token more; [`Error::Unsupported`] if tokens would have to be read
    /// once more where rows leave a sliding window, or keys be moved where they are stored otherwise than the CPU kernels
    /// read them, or were rotated by the sequence's length. Others as [`prefill_with`](Self::prefill_with), after which the
    /// cache is of no use.
    pub fn make_room(
        &self,
        cache: &mut AdaptiveKvCache,
        tokens: usize,
        options: PrefillOptions,
        observer: &mut dyn PrefillObserver,
    ) -> Result<()> {
        self.make_positions(cache, tokens)?;
        if cache.room() < tokens {
            let bounds = cache.bounds();
            cache.set_bounds(Bounds { ahead: bounds.ahead.max(tokens).max(LEAST_AHEAD), ..bounds });
            let ids = cache.forget_undecided()?;
            let cut = if ids.is_empty() {
                self.cut_back(cache)
            } else {
                self.prefill_with(&ids, cache, options, observer).map(drop)
            };
            cache.set_bounds(bounds);
            cut?;
            if cache.room() < tokens {
                return Err(full(cache));
            }
        }
        cache.reserve(tokens.saturating_add(RUN).min(cache.room()));
        Ok(())
    }

    /// Moves what is held to positions without gaps, if the context has too few for what comes and the sequence is to go on
    /// beyond it ([`Overflow::Shift`]); else nothing happens. A head that holds more than half of the context lets the lowest
    /// scores go, or the oldest.
    ///
    /// * `tokens`: that are to come
    ///
    /// # Errors
    /// [`Error::Unsupported`] if keys can't be moved, see [`make_room`](Self::make_room).
    pub fn make_positions(&self, cache: &mut AdaptiveKvCache, tokens: usize) -> Result<()> {
        let fits = cache.seen().saturating_add(tokens) <= self.config().context_length;
        if fits || cache.bounds().overflow == Overflow::Stop {
            return Ok(());
        }
        if self.config().rope.dynamic.is_some() {
            return Err(Error::unsupported("moving keys that were rotated by the length of the sequence")
                .with_hint("stop at the end of the context"));
        }
        self.move_together(cache)
    }
}

impl<B: Backend> Model<B> {
    /// Lets the lowest scores of what is held go.
    pub(super) fn cut_to_budget(&self, cache: &mut AdaptiveKvCache) -> Result<()> {
        let Retention::Adaptive { config, .. } = cache.retention().clone() else { return Ok(()) };
        let Some(method) = config.budgeted().filter(|_| config.rejudges()) else { return Ok(()) };
        let bounds = cache.bounds();
        anew::cut::<B>(method, &|layer| anew::place(self, layer, Some(&config), (bounds, 0)), cache)
    }

    /// See [`Llama::make_room`].
    pub(super) fn move_rows_together(&self, cache: &mut AdaptiveKvCache) -> Result<()> {
        let seen = cache.seen();
        let most = (self.config.context_length / MOVED_SHARE).max(1);
        let pinned = cache.bounds().pinned.min(most / MOVED_SHARE);
        // What no prompt has decided about is held by all heads, or counts as decided about.
        let protected = cache.bounds().protected.max(cache.undecided()).min(most / MOVED_SHARE);
        let undecided = cache.undecided().min(protected);
        let position = |position: usize| u32::try_from(position).unwrap_or(u32::MAX);
        let safe = Safe { before: position(pinned), from: position(seen.saturating_sub(protected)) };
        let layers = cache.layers_mut::<B::Rows>()?;
        for layer in &mut *layers {
            if layer.ledger().lens().iter().all(|&len| len <= most) {
                continue;
            }
            let heads = layer.ledger().candidates(seen);
            let has_scores = heads.iter().flatten().any(|&(_, score)| score != 0.0);
            // Without scores the oldest go.
            #[expect(clippy::cast_precision_loss)] // 2^24 tokens are far beyond any context
            let by_age = |head: Candidates| head.into_iter().map(|(at, _)| (at, at as f32)).collect::<Candidates>();
            let heads = if has_scores { heads } else { heads.into_iter().map(by_age).collect() };
            let kept = select(Allocation::Uniform, most, safe, &heads);
            layer.keep_some(&kept, seen - undecided)?;
        }
        let taken = layers.iter().map(|layer| layer.positions_together(pinned)).max().unwrap_or(0);
        let head_dim = self.config.heads.head_dim;
        for layer in layers {
            layer.renumber((pinned, taken), &|by, key| self.rope.turn_by(key, head_dim, by))?;
        }
        cache.shift(seen - taken, undecided);
        Ok(())
    }
}

fn full(cache: &AdaptiveKvCache) -> Error {
    let budget = cache.budget().unwrap_or_default();
    Error::input(format!("the budget of {} has no room for another token", crate::sizes::size(budget)))
        .with_hint("give a larger --kv-budget")
}
