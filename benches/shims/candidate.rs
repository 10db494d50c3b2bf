//! Who is measured.

use serde::Serialize;

/// One column of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Candidate {
    /// Our shim with crun.
    Ours,
    /// containerd's Go shim with crun.
    GoCrun,
    /// containerd's Go shim with runc.
    GoRunc,
    /// The bare crun commands, without a shim: the limit.
    Crun,
}

impl Candidate {
    /// In the order of the table.
    pub(crate) const ALL: [Self; 4] = [Self::Ours, Self::GoCrun, Self::GoRunc, Self::Crun];

    /// Its name on the command line and in the JSON.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::GoCrun => "go-crun",
            Self::GoRunc => "go-runc",
            Self::Crun => "crun",
        }
    }

    /// Its name for a person.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Ours => "this shim + crun",
            Self::GoCrun => "Go shim + crun",
            Self::GoRunc => "Go shim + runc",
            Self::Crun => "bare crun",
        }
    }

    /// Its colour in the chart, told apart by people who see colours differently (Okabe-Ito).
    pub(crate) fn colour(self) -> &'static str {
        match self {
            Self::Ours => "#0072b2",
            Self::GoCrun => "#e69f00",
            Self::GoRunc => "#d55e00",
            Self::Crun => "#999999",
        }
    }

    /// The runtime program that a shim of this candidate is told to use.
    pub(crate) fn runtime(self) -> &'static str {
        match self {
            Self::GoRunc => "runc",
            Self::Ours | Self::GoCrun | Self::Crun => "crun",
        }
    }

    /// Whether a shim takes part at all.
    pub(crate) fn has_shim(self) -> bool {
        self != Self::Crun
    }
}
