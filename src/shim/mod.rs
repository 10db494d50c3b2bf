//! What containerd sees.
