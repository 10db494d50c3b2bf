//! The only place that forks and reaps.
