//! Whether a store does what backups need of it.

use std::time::{Duration, Instant};

use bytes::Bytes;
use chrono::{DateTime, TimeDelta, Utc};
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::Store;
use crate::Result;
use crate::catalog::ObjectName;
use crate::doctor::{Finding, Health};

/// A clock that is off by more than this makes times of backups misleading.
const MOST_SKEW: Duration = Duration::from_secs(30);
/// How long a new object may take to be listed.
const LIST_LIMIT: Duration = Duration::from_secs(10);
/// Larger than one part of an upload.
const LARGE_BYTES: usize = 9 << 20;

/// How far this machine is ahead of a store that says when an object was put, which was at some time between these two: a put
/// may take its time.
fn skew((earliest, latest): (DateTime<Utc>, DateTime<Utc>), stamped: DateTime<Utc>) -> TimeDelta {
    earliest.signed_duration_since(stamped).max(TimeDelta::zero())
        + latest.signed_duration_since(stamped).min(TimeDelta::zero())
}

impl Store {
    /// Tries everything that backups need, with objects that are named like uploads under way: a `gc` removes what is left
    /// of them when this is cut short. An error is a store that cannot even be listed.
    pub async fn examine(&self) -> Result<Vec<Finding>> {
        let mut findings = Vec::new();
        let mut say =
            |health, what: &'static str, found: String| findings.push(Finding { health, what: what.into(), found });
        let started = Instant::now();
        let catalog = self.catalog().await?;
        let (timelines, foreign, took) = (catalog.timelines.len(), catalog.foreign.len(), started.elapsed());
        say(Health::Good, "list", format!("{timelines} timelines, {foreign} objects not ours, in {took:.0?}"));
        let name = |random| ObjectName::Uploading { timeline: 0, unix_ms: Utc::now().timestamp_millis(), random };
        let (small, large) = (name(rand::random()), name(rand::random()));
        let content = Bytes::from_static(b"sidecar doctor");
        let put_at = Utc::now();
        match self.put_new(&small, std::slice::from_ref(&content)).await {
            Ok(()) => {
                say(Health::Good, "put", "an object can be written".into());
                self.examine_small((&small, put_at), &content, &mut say).await;
                self.examine_large(&large, &mut say).await;
                let gone = async {
                    self.delete(&small).await?;
                    self.delete(&large).await?;
                    self.exists(&small).await
                };
                match gone.await {
                    Ok(false) => say(Health::Good, "delete", "what was written is gone".into()),
                    Ok(true) => say(Health::Remark, "delete", "an object is still there after it was deleted".into()),
                    Err(error) => {
                        let what = "backups can be taken, but `gc` cannot delete what is too old";
                        say(Health::Remark, "delete", format!("{error}: {what}"));
                    }
                }
            }
            Err(error) => {
                say(Health::Bad, "put", format!("{error}: backups cannot be taken here, only restored"));
            }
        }
        Ok(findings)
    }

    async fn examine_small(
        &self,
        (name, put_at): (&ObjectName, DateTime<Utc>),
        content: &Bytes,
        say: &mut impl FnMut(Health, &'static str, String),
    ) {
        let path = self.path(&name.to_string());
        match self.get_range(name, 3..9).await {
            Ok(range) if range == content.slice(3..9) => {
                say(Health::Good, "ranged read", "a part of an object can be read".into());
            }
            Ok(_) => say(Health::Bad, "ranged read", "other bytes came than were asked for".into()),
            Err(error) => say(Health::Bad, "ranged read", error.to_string()),
        }
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let again = self.inner.put_opts(&path, PutPayload::from_static(b"another"), options).await;
        let whole = self.get_range(name, 0..content.len() as u64).await;
        match (again, whole) {
            (Err(object_store::Error::AlreadyExists { .. }), Ok(whole)) if whole == *content => {
                say(Health::Good, "create once", "an object that exists is not overwritten".into());
            }
            (Ok(_), _) => {
                let what = "a second put of a name overwrites the first (If-None-Match is ignored); names have the millisecond in them, and a new timeline is read back before it is used: keep to one writer for each prefix";
                say(Health::Remark, "create once", what.into());
            }
            (Err(object_store::Error::AlreadyExists { .. }), Ok(_)) => {
                let what = "an object that exists was refused and changed nevertheless";
                say(Health::Bad, "create once", what.into());
            }
            (Err(error), _) => say(Health::Remark, "create once", format!("it could not be tried: {error}")),
        }
        match self.inner.head(&path).await {
            Ok(head) => {
                let skew = skew((put_at, Utc::now()), head.last_modified);
                let off = skew.abs().to_std().unwrap_or_default();
                let seconds = skew.num_seconds();
                if off <= MOST_SKEW {
                    say(
                        Health::Good,
                        "clock",
                        format!("this machine and the store agree within {} s", off.as_secs() + 1),
                    );
                } else {
                    let what = "times of backups, `restore --time` and retention go by this machine's clock";
                    say(Health::Remark, "clock", format!("this machine is {seconds} s ahead of the store: {what}"));
                }
            }
            Err(error) => say(Health::Remark, "clock", format!("the store does not say what time it is: {error}")),
        }
        let started = Instant::now();
        loop {
            let listed = self.catalog().await.map(|catalog| catalog.uploading.iter().any(|(found, _)| found == name));
            match listed {
                Ok(true) => {
                    say(Health::Good, "list what is new", format!("after {:.0?}", started.elapsed()));
                    break;
                }
                Ok(false) if started.elapsed() < LIST_LIMIT => tokio::time::sleep(Duration::from_millis(200)).await,
                Ok(false) => {
                    let what = "a run that begins soon after another ended would not see its last backup";
                    say(
                        Health::Bad,
                        "list what is new",
                        format!("a new object is not listed after {LIST_LIMIT:?}: {what}"),
                    );
                    break;
                }
                Err(error) => {
                    say(Health::Bad, "list what is new", error.to_string());
                    break;
                }
            }
        }
    }

    async fn examine_large(&self, name: &ObjectName, say: &mut impl FnMut(Health, &'static str, String)) {
        let content: Bytes = (0..LARGE_BYTES).map(|n| (n / 1000) as u8).collect();
        let staging = ObjectName::Uploading { timeline: 0, unix_ms: name.unix_ms(), random: rand::random() };
        let uploaded = async {
            let mut upload = self.upload(staging);
            let finished = async {
                upload.write(content.clone()).await?;
                upload.finish(name).await
            };
            let finished = finished.await;
            if finished.is_err() {
                upload.abort().await;
            }
            finished?;
            self.get_whole(name, LARGE_BYTES as u64).await
        };
        let found: Result<Vec<u8>> = uploaded.await;
        match found {
            Ok(found) if found == content => {
                say(Health::Good, "upload in parts", "and a name given to it afterwards".into());
            }
            Ok(_) => say(Health::Bad, "upload in parts", "what was read back is not what was written".into()),
            Err(error) => say(Health::Bad, "upload in parts", error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use object_store::memory::InMemory;

    use super::*;

    #[tokio::test]
    async fn a_store_in_memory_does_all_that_is_needed() -> Result<()> {
        let store = Store::from_parts(Arc::new(InMemory::new()), "some/prefix");
        let findings = store.examine().await?;
        let tried: Vec<_> = findings.iter().map(|finding| (finding.what.as_ref(), finding.health)).collect();
        for what in ["list", "put", "ranged read", "create once", "clock", "delete"] {
            assert!(tried.contains(&(what, Health::Good)), "{what}: {findings:?}");
        }
        assert!(tried.iter().all(|(_, health)| *health == Health::Good), "{findings:?}");
        let catalog = store.catalog().await?;
        assert!(catalog.uploading.is_empty() && catalog.foreign.is_empty());
        Ok(())
    }

    #[test]
    fn a_slow_put_is_no_wrong_clock() {
        let at = |seconds| DateTime::from_timestamp(seconds, 0).unwrap_or_default();
        for (stamped, ahead) in [(100, 0), (130, 0), (160, 0), (40, 60), (200, -40)] {
            assert_eq!(skew((at(100), at(160)), at(stamped)).num_seconds(), ahead, "{stamped}");
        }
    }
}
