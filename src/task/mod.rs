//! The engine.

pub mod bundle;
pub mod event;
pub mod record;
pub mod stdio;
