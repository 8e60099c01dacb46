//! Whether users, roles or auth have changed since the newest full snapshot.

use proto::backup::ObjectMeta;

use crate::Class;
use crate::etcd::Etcd;

/// What can be seen of users, roles and whether auth is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Auth {
    /// The auth revision, where etcd tells it.
    Revision(u64),
    /// What users and roles look like.
    Fingerprint(u64),
}

/// Notices that auth has changed since the newest full snapshot.
#[derive(Debug, Default)]
pub(super) struct AuthWatch {
    pub baseline: Option<Auth>,
    off: bool,
}

impl AuthWatch {
    pub(super) fn since(full: &ObjectMeta) -> Self {
        let baseline = match full.auth_fingerprint {
            0 => Auth::Revision(full.auth_revision),
            fingerprint => Auth::Fingerprint(fingerprint),
        };
        Self { baseline: Some(baseline), off: false }
    }

    async fn look(&mut self, etcd: &mut Etcd) -> Option<Auth> {
        if self.off {
            return None;
        }
        let looked = match etcd.auth_revision().await {
            Ok(Some(revision)) => Ok(Auth::Revision(revision)),
            Ok(None) => etcd.auth_fingerprint().await.map(Auth::Fingerprint),
            Err(error) => Err(error),
        };
        match looked {
            Ok(auth) => Some(auth),
            Err(error) => {
                if error.class() == Class::Denied {
                    self.off = true;
                    tracing::warn!(%error, "this user may not see auth changes; they are backed up with scheduled full snapshots only");
                }
                None
            }
        }
    }

    pub(super) async fn changed(&mut self, etcd: &mut Etcd) -> bool {
        let now = self.look(etcd).await;
        now.is_some() && self.baseline.is_some() && now != self.baseline
    }

    pub(super) async fn rebase(&mut self, etcd: &mut Etcd) {
        self.baseline = self.look(etcd).await;
    }
}
