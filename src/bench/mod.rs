//! Speed and memory of a model, measured case by case: prefill and decoding at several prompt lengths, with several
//! caches, on several numbers of threads.
//!
//! [`run`] goes through a [`Plan`] and hands over a [`Row`] for each case. Caches take turns within each round of runs,
//! so that what drifts on the machine (heat, neighbours) hits all of them alike. Not for: what the model answers
//! ([`crate::fidelity`]), or single kernels (`benches/`).

mod measure;
mod read_loop;
mod row;
mod threads;
mod times;

pub use measure::{Observer, Plan, Setting, Subject, run};
pub use read_loop::read_rate;
pub use row::{Reading, Row, Work, write_rows};
pub use threads::with_threads;
pub use times::Spread;
