//! cgroups of a container, v1, hybrid and v2.
