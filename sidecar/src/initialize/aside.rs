//! Members that others took the place of. They stay beside for a person to look at, so many that the disk does not fill.

use std::path::{Path, PathBuf};

use chrono::{DateTime, NaiveDateTime, TimeDelta, Utc};
use etcd_format::datadir;

use crate::{Error, Result};

/// So many stay.
const MOST: usize = 3;
/// The first of so long stays, whatever came after it: that has what no backup had, its successors came from the store.
const RECENT: TimeDelta = TimeDelta::hours(24);

const PREFIX: &str = "member.replaced-";
const STAMP: &str = "%Y%m%dT%H%M%S%.3fZ";

/// Moves a member aside, in its data directory.
pub(super) fn move_member(dir: &Path) -> Result<PathBuf> {
    // An etcd that has started since must not lose it.
    datadir::check_target(dir, true).map_err(Error::format(dir.display().to_string()))?;
    let member = dir.join("member");
    let aside = dir.join(format!("{PREFIX}{}", Utc::now().format(STAMP)));
    std::fs::rename(&member, &aside).map_err(Error::io("move aside", member.display()))?;
    Ok(aside)
}

/// Deletes those that are too many. What cannot be deleted stays, and that is said.
pub(super) async fn tidy(dir: &Path, now: DateTime<Utc>) {
    let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    for name in too_many(names.collect(), now) {
        let path = dir.join(name);
        match tokio::fs::remove_dir_all(&path).await {
            Ok(()) => tracing::info!(path = %path.display(), "what was moved aside long ago is deleted"),
            Err(error) => tracing::warn!(path = %path.display(), %error, "what was moved aside cannot be deleted"),
        }
    }
}

/// Which of them go. What does not look like ours is none.
fn too_many(names: Vec<String>, now: DateTime<Utc>) -> Vec<String> {
    let stamped = |name: String| {
        let stamp = NaiveDateTime::parse_from_str(name.strip_prefix(PREFIX)?, STAMP).ok()?;
        Some((stamp.and_utc(), name))
    };
    let mut there: Vec<_> = names.into_iter().filter_map(stamped).collect();
    there.sort();
    let mut gone = Vec::new();
    while there.len() > MOST {
        let first_is_recent = now.signed_duration_since(there[0].0) < RECENT;
        gone.push(there.remove(usize::from(first_is_recent)).1);
    }
    gone
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_stay_and_the_first_of_a_day() {
        let now = DateTime::from_timestamp(1_800_000_000, 0).unwrap_or_default();
        let named = |hours: i64| format!("{PREFIX}{}", (now - TimeDelta::hours(hours)).format(STAMP));
        let of = |hours: &[i64]| hours.iter().map(|hours| named(*hours)).collect::<Vec<_>>();
        for (there, goes) in [
            (&[3, 2, 1][..], &[][..]),
            (&[5, 4, 3, 2, 1], &[4, 3]),
            (&[900, 800, 700, 1], &[900]),
            (&[900, 800, 4, 3, 2, 1], &[900, 800, 3]),
            (&[30, 29, 28, 27], &[30]),
        ] {
            assert_eq!(too_many(of(there), now), of(goes), "{there:?}");
        }
        let others = ["member", "member.replaced-found-1", "member.replaced-", "member.restoring", "joined.json"];
        let mut names = of(&[4, 3, 2, 1]);
        names.extend(others.map(str::to_owned));
        assert_eq!(too_many(names, now), of(&[3]));
    }
}
