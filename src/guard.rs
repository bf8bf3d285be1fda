//! Calls into libraries that may panic on what a file or a user gives them: a panic there becomes an error here.
//!
//! A panic's message is printed by the process's hook before anybody catches it, and a library must not change that
//! hook. A program that wants no such lines sets one that asks [`is_guarded`], as this project's does.
//!
//! Not for: hiding bugs of this library's own code, whose panics go through.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    /// Guarded calls that this thread is in.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Whether this thread is in a call whose panics become errors, so that nobody needs to be told of them.
#[must_use]
pub fn is_guarded() -> bool {
    // A thread that is about to end has no such variable any more.
    DEPTH.try_with(|depth| depth.get() > 0).unwrap_or(false)
}

/// Runs `work`; a panic's message if it panics.
///
/// What `work` has half changed by then must not be used any more.
pub(crate) fn catch<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    struct Leave;
    impl Drop for Leave {
        fn drop(&mut self) {
            DEPTH.set(DEPTH.get() - 1);
        }
    }
    DEPTH.set(DEPTH.get() + 1);
    let leave = Leave;
    let result = catch_unwind(AssertUnwindSafe(work));
    drop(leave);
    result.map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        text.unwrap_or("it panicked").to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_caught_with_its_message_and_only_inside() {
        assert!(!is_guarded());
        assert_eq!(catch(is_guarded), Ok(true));
        let nested = catch(|| catch(|| panic!("inner {}", 1)).map_err(|inner| (inner, is_guarded())));
        assert_eq!(nested, Ok(Err::<(), _>(("inner 1".to_owned(), true))));
        assert_eq!(catch(|| panic!("outer")), Err::<(), _>("outer".to_owned()));
        assert!(!is_guarded());
    }
}
