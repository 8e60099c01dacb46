//! Where a restored member comes from.

use std::path::Path;

use etcd_format::datadir::{self, RealDisk, Staged};
use etcd_format::wal;
use serde::{Deserialize, Serialize};

use super::{Plan, Source};
use crate::catalog::Timeline;
use crate::{Error, Result};

/// What a restored member says of where it comes from, until its own backups do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Origin {
    /// The timeline that it was restored from; `None` for a file.
    pub timeline: Option<Timeline>,
    /// Id of the cluster whose backups these were, hexadecimal; 0 when they did not tell.
    pub cluster_id: String,
    /// The last revision that was restored.
    pub revision: i64,
    /// The full snapshot that it began with, as the store names it; `None` for a file.
    #[serde(default)]
    pub object: Option<String>,
    /// A newer timeline than that, which somebody passed over, and the cluster that it is of.
    #[serde(default)]
    pub passed_over: Option<(Timeline, String)>,
}

impl Origin {
    /// That of the member in a data directory; `None` when it was not restored, or by something else.
    pub fn of(data_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&datadir::origin(data_dir)?).ok()
    }

    /// Whose backups, or data, it comes from, where that is known.
    pub fn cluster(&self) -> Option<u64> {
        u64::from_str_radix(&self.cluster_id, 16).ok().filter(|id| *id != 0)
    }

    /// Whether it may come from the backups of a cluster, as far as both tell.
    pub fn is_of(&self, cluster_id: Option<u64>) -> bool {
        self.cluster().is_none_or(|ours| cluster_id.is_none_or(|theirs| theirs == ours))
    }

    /// Whether that timeline, of that cluster, was there and newer when this one was chosen.
    pub fn passed_over(&self, timeline: Timeline, theirs: Option<u64>) -> bool {
        let theirs = theirs.map(|id| format!("{id:x}"));
        self.passed_over.as_ref().is_some_and(|(over, of)| *over == timeline && Some(of) == theirs.as_ref())
    }

    /// What a plan makes of data of a cluster, which ends at a revision.
    pub(super) fn of_plan(plan: &Plan, cluster_id: u64, revision: i64) -> Self {
        let of = |cluster_id: u64| format!("{cluster_id:x}");
        match &plan.source {
            Source::Chain { timeline, chain, passed_over, .. } => Self {
                timeline: Some(*timeline),
                cluster_id: of(cluster_id),
                revision,
                object: Some(chain.full.name(*timeline).to_string()),
                passed_over: passed_over.clone(),
            },
            // A file does not say; the log beside it does, or that of the member in whose place it is put.
            Source::File { path, .. } => {
                let beside = path.parent().and_then(Path::parent).map(|member| member.join("wal"));
                let replaced = plan.targets.iter().map(|target| target.data_dir.join("member/wal"));
                let logs = beside.into_iter().chain(replaced).filter_map(|dir| wal::read(&dir).ok());
                let cluster_id = of(logs.map(|log| log.metadata.cluster_id()).next().unwrap_or(0));
                Self { timeline: None, cluster_id, revision, object: None, passed_over: None }
            }
        }
    }

    pub(super) fn write(&self, staged: &Staged<RealDisk>) -> Result<()> {
        let json =
            serde_json::to_vec(self).map_err(|error| Error::Bug { what: format!("describe a restore: {error}") })?;
        staged.write_origin(&json).map_err(Error::format("restore"))
    }
}
