//! The engine.

pub mod bundle;
pub mod record;
