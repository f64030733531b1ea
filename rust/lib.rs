//! Ternary (1.58-bit) language models on CPUs: exact integer projections, a
//! float half with one defined order of operations, and the same bits from
//! every kernel, instruction set, thread count and batch.
//!
//! The crate reads from the bottom up: [`error`], [`cpu`] (what this CPU can
//! do, as types), [`ternary`] (the canonical weight matrix), [`levels`] (its
//! generalization to a few integer values), [`kernels`] (the only arithmetic on
//! packed weights), [`ops`] (the float half),
//! [`kv_cache`], [`threads`], and [`models`] (the forward passes). The Python
//! binding is a private module behind the feature `python`.

pub mod cpu;
pub mod error;
pub mod floats;
pub mod kernels;
pub mod kv_cache;
pub mod levels;
mod memory;
pub mod models;
pub mod ops;
pub mod ternary;
pub mod threads;

#[cfg(feature = "python")]
mod python;

pub use error::Error;
