//! Whether users, roles or auth have changed since the newest full snapshot.

use proto::backup::ObjectMeta;

use crate::etcd::Etcd;
use crate::{Class, Result};

const AUTH_OFF: u32 = 1;
const AUTH_ON: u32 = 2;

/// What can be seen of users, roles and whether auth is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Auth {
    /// The auth revision, where etcd tells it, and whether auth is on, where that is known: turning it on or off does not
    /// change the revision.
    Revision(u64, Option<bool>),
    /// What users and roles look like.
    Fingerprint(u64),
}

/// Notices that auth has changed since the newest full snapshot.
#[derive(Debug, Default)]
pub(super) struct AuthWatch {
    baseline: Option<Auth>,
    denied: bool,
}

impl AuthWatch {
    /// Since the full snapshot with this metadata.
    pub fn since(full: &ObjectMeta) -> Self {
        let baseline = match full.auth_fingerprint {
            0 => Auth::Revision(full.auth_revision, (full.auth_state > 0).then_some(full.auth_state == AUTH_ON)),
            fingerprint => Auth::Fingerprint(fingerprint),
        };
        Self { baseline: Some(baseline), denied: false }
    }

    async fn look(&mut self, etcd: &mut Etcd) -> Result<Option<Auth>> {
        let looked = match etcd.auth_revision().await {
            Ok(Some((revision, enabled))) => Ok(Auth::Revision(revision, Some(enabled))),
            Ok(None) => etcd.auth_fingerprint().await.map(Auth::Fingerprint),
            Err(error) => Err(error),
        };
        match looked {
            Ok(auth) => {
                self.denied = false;
                Ok(Some(auth))
            }
            // It was turned on since we connected: connect again, as the user that we were given.
            Err(error) if error.class() == Class::Denied && etcd.left_out_user() => Err(error),
            Err(error) if error.class() == Class::Denied => {
                if !std::mem::replace(&mut self.denied, true) {
                    tracing::error!(%error, "etcd refuses to tell of auth; changes of users and roles go unnoticed until it does: look at --user, its password and its role");
                }
                Ok(None)
            }
            Err(error) => {
                tracing::debug!(%error, "auth could not be looked at");
                Ok(None)
            }
        }
    }

    /// Looks whether something changed. What cannot be seen now is seen later.
    pub async fn changed(&mut self, etcd: &mut Etcd) -> Result<bool> {
        let now = self.look(etcd).await?;
        Ok(match (now, self.baseline) {
            (Some(Auth::Revision(now, enabled)), Some(Auth::Revision(before, was_enabled))) => {
                now != before || was_enabled.is_some_and(|was| enabled != Some(was))
            }
            (Some(now), Some(before)) => now != before,
            _ => false,
        })
    }

    /// Remembers what is there before a full snapshot is taken.
    pub async fn rebase(&mut self, etcd: &mut Etcd) {
        if let Ok(Some(now)) = self.look(etcd).await {
            self.baseline = Some(now);
        }
    }

    /// What is to be recorded with a full snapshot, where etcd does not tell its auth revision.
    pub fn fingerprint(&self) -> Option<u64> {
        match self.baseline {
            Some(Auth::Fingerprint(fingerprint)) => Some(fingerprint),
            _ => None,
        }
    }

    /// What is to be recorded with a full snapshot of whether auth was on before it was begun; 0 when that is not known.
    pub fn state(&self) -> u32 {
        match self.baseline {
            Some(Auth::Revision(_, Some(true))) => AUTH_ON,
            Some(Auth::Revision(_, Some(false))) => AUTH_OFF,
            _ => 0,
        }
    }

    /// A full snapshot with this auth revision is in the store.
    pub fn taken(&mut self, auth_revision: u64) {
        match self.baseline {
            Some(Auth::Fingerprint(_)) => {}
            Some(Auth::Revision(_, enabled)) => self.baseline = Some(Auth::Revision(auth_revision, enabled)),
            None => self.baseline = Some(Auth::Revision(auth_revision, None)),
        }
    }
}
