//! Who is measured.

use serde::Serialize;

/// One column of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Candidate {
    /// Our shim with crun.
    Ours,
    /// Our shim with LXC.
    OursLxc,
    /// containerd's Go shim with crun.
    GoCrun,
    /// containerd's Go shim with runc.
    GoRunc,
    /// The bare crun commands, without a shim: the limit.
    Crun,
    /// LXC's own commands, without a shim: the limit for LXC.
    Lxc,
}

impl Candidate {
    /// In the order of the table.
    pub(crate) const ALL: [Self; 6] = [
        Self::Ours,
        Self::OursLxc,
        Self::GoCrun,
        Self::GoRunc,
        Self::Crun,
        Self::Lxc,
    ];

    /// Its name on the command line and in the JSON.
    pub(crate) fn key(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::OursLxc => "ours-lxc",
            Self::GoCrun => "go-crun",
            Self::GoRunc => "go-runc",
            Self::Crun => "crun",
            Self::Lxc => "lxc",
        }
    }

    /// Its name for a person.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Ours => "this shim + crun",
            Self::OursLxc => "this shim + lxc",
            Self::GoCrun => "Go shim + crun",
            Self::GoRunc => "Go shim + runc",
            Self::Crun => "bare crun",
            Self::Lxc => "bare lxc",
        }
    }

    /// Its colour in the chart, told apart by people who see colours differently (Okabe-Ito).
    pub(crate) fn colour(self) -> &'static str {
        match self {
            Self::Ours => "#0072b2",
            Self::OursLxc => "#56b4e9",
            Self::GoCrun => "#e69f00",
            Self::GoRunc => "#d55e00",
            Self::Crun => "#777777",
            Self::Lxc => "#bbbbbb",
        }
    }

    /// Who its numbers are set in relation to in the chart.
    pub(crate) fn reference(self) -> Self {
        if self.needs_lxc() { Self::Lxc } else { Self::GoCrun }
    }

    /// Whether a shim takes part at all.
    pub(crate) fn has_shim(self) -> bool {
        !matches!(self, Self::Crun | Self::Lxc)
    }

    /// Whether LXC has to be installed.
    pub(crate) fn needs_lxc(self) -> bool {
        matches!(self, Self::OursLxc | Self::Lxc)
    }
}
