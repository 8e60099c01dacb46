//! How far a restore is.

/// Told to whoever watches a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// Reading the snapshot; so many bytes in all when known.
    Snapshot(Option<u64>),
    /// So many bytes of the snapshot were written.
    Bytes(u64),
    /// Appending the changes of so many deltas.
    Deltas(u64),
    /// One delta is done.
    Delta,
    /// Writing the other members.
    Members(u64),
    /// Checking and syncing.
    Verify,
}

/// How far a restore is in what it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Far {
    /// What it does: `start`, `snapshot`, `deltas`, `members`, `verify`.
    pub phase: &'static str,
    /// Of this phase, in bytes of the database, deltas or members.
    pub done: u64,
    /// 0 when not known.
    pub total: u64,
}

impl Default for Far {
    fn default() -> Self {
        Self { phase: "start", done: 0, total: 0 }
    }
}

impl Far {
    /// Takes a step in; whether a phase begins with it.
    pub fn see(&mut self, progress: Progress) -> bool {
        let (phase, total) = match progress {
            Progress::Bytes(bytes) => {
                self.done = self.done.saturating_add(bytes);
                return false;
            }
            Progress::Delta => {
                self.done = self.done.saturating_add(1);
                return false;
            }
            Progress::Snapshot(total) => ("snapshot", total.unwrap_or(0)),
            Progress::Deltas(total) => ("deltas", total),
            Progress::Members(total) => ("members", total),
            Progress::Verify => ("verify", 0),
        };
        *self = Self { phase, done: 0, total };
        true
    }
}

impl std::fmt::Display for Far {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { phase, done, total } = self;
        let of = |f: &mut std::fmt::Formatter<'_>, unit: &str, each: u64| match total {
            0 => write!(f, "{}{unit}", done / each),
            total => write!(f, "{} of {}{unit}", done / each, total / each),
        };
        match *phase {
            "snapshot" => {
                f.write_str("write the snapshot: ")?;
                of(f, " MiB", 1 << 20)
            }
            "deltas" => {
                f.write_str("append the deltas after it: ")?;
                of(f, "", 1)
            }
            "members" => write!(f, "make {total} members of it"),
            "verify" => f.write_str("check what was restored"),
            _ => f.write_str("begin to restore"),
        }
    }
}
