//! A page for a person: the member, its cluster, and what could be restored. Rendered here, without any script, and complete in
//! itself: it asks for nothing else.

use std::sync::Arc;

use axum::Router;
use axum::extract::Request;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use chrono::{DateTime, Utc};
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::connection::Peer;
use crate::catalog::{Catalog, History, Timeline};
use crate::etcd::{Etcd, Listed, Role};
use crate::human::{bytes, time};
use crate::supervise::{Observed, Phase, Supervisor};

/// How wide and high the picture of a timeline is.
const WIDTH: i64 = 900;
const HEIGHT: i64 = 46;
/// So many objects are drawn of one timeline, the newest: a page is for a look.
const MOST_DRAWN: usize = 2000;
/// So many timelines are drawn, the newest.
const MOST_TIMELINES: usize = 8;

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1c2733;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:.3rem .8rem .3rem 0;border-bottom:1px solid #dde3ea;vertical-align:top}th{font-weight:600;white-space:nowrap}
.badge{border-radius:.7em;padding:.1em .7em;background:#dde3ea;font-size:.85rem}.good{background:#cdeed6}.bad{background:#f8d0cb}
svg{width:100%;height:auto;background:#f5f7f9;border-radius:4px}code{font-size:.9em;overflow-wrap:anywhere}
@media(prefers-color-scheme:dark){body{background:#14191f;color:#d7dee6}th,td{border-color:#2c3642}svg{background:#1c232b}.badge{color:#14191f}}";

/// What is shown.
struct View<'s> {
    name: &'s str,
    phase: &'s Phase,
    observed: &'s Observed,
    store: Option<&'s str>,
    /// Or why it cannot be listed.
    catalog: Option<Result<&'s Catalog, &'s str>>,
    trouble: Option<String>,
    unsaved_seconds: Option<f64>,
    members: &'s [Listed],
    now: DateTime<Utc>,
}

/// The page, at `/`.
pub(super) fn routes(supervisor: Arc<Supervisor>, needs_certificate: bool) -> Router {
    let show = move |request: Request| async move {
        if needs_certificate && !Peer::is_known(request.extensions()) {
            return (StatusCode::UNAUTHORIZED, "this page needs a client certificate\n").into_response();
        }
        show(&supervisor).await
    };
    Router::new().route("/", get(show))
}

async fn show(supervisor: &Supervisor) -> Response {
    let settings = supervisor.settings();
    let observed = supervisor.observed();
    let phase = supervisor.phase().borrow().clone();
    let listed = supervisor.listed().await;
    let members = async {
        let endpoint = settings.etcd.endpoints.first()?;
        Etcd::reach(&settings.etcd, endpoint.trim()).await.ok()?.0.members().await.ok()
    };
    let members = if observed.role.is_some() { members.await.unwrap_or_default() } else { Vec::new() };
    let store = settings.initialize.store.as_ref();
    let shown = View {
        name: &settings.initialize.member.name,
        phase: &phase,
        observed: &observed,
        store: store.map(crate::store::Store::url),
        catalog: listed.as_ref().map(|listed| listed.as_ref().map(AsRef::as_ref).map_err(String::as_str)),
        unsaved_seconds: supervisor.unsaved_seconds(),
        trouble: supervisor.trouble(),
        members: &members,
        now: Utc::now(),
    };
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; style-src 'unsafe-inline'"),
    ];
    (headers, page(&shown).into_string()).into_response()
}

fn page(shown: &View<'_>) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width";
                meta http-equiv="refresh" content="30";
                title { "etcd " (shown.name) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { "etcd " (shown.name) " " (badge(shown.observed)) }
                (member(shown))
                h2 { "Backups" }
                (backups(shown))
                @if !shown.members.is_empty() {
                    h2 { "Members" }
                    (members(shown))
                }
            }
        }
    }
}

fn badge(observed: &Observed) -> Markup {
    let (word, class) = match observed.role {
        Some(Role::Leader) => ("leads", "badge good"),
        Some(Role::Follower) => ("follows", "badge good"),
        Some(Role::Learner) => ("learns", "badge"),
        None => ("not reached", "badge bad"),
    };
    html! { span.(class) id="role" { (word) } }
}

fn member(shown: &View<'_>) -> Markup {
    let (phase, why) = match shown.phase {
        Phase::New => ("nobody has asked to start etcd yet", String::new()),
        Phase::Running(step) => ("the data is being looked after", step.to_string()),
        Phase::Ready(outcome) => ("etcd may run", format!("{}, for {}", outcome.done.name(), outcome.reason)),
        Phase::Refused(outcome) => ("etcd must not start", outcome.reason.clone()),
        Phase::Failed(error) => ("the data could not be looked after", error.to_string()),
    };
    let observed = shown.observed;
    html! {
        table {
            tr { th { "Data" } td id="phase" { (phase) @if !why.is_empty() { ": " (why) } } }
            @if let Some(status) = &observed.status {
                tr { th { "etcd" } td { (status.version) ", revision " (status.revision) ", raft term " (status.raft_term) } }
                tr { th { "Database" } td { (bytes(status.db_size.max(0) as u64)) ", " (bytes(status.db_size_in_use.max(0) as u64)) " in use" } }
                tr { th { "Cluster" } td { code { (format!("{:x}", status.cluster_id)) } } }
            }
            @for (member, alarm) in observed.alarms() {
                tr { th { "Alarm" } td { span.badge.bad { (alarm.name()) } " of member " code { (format!("{member:x}")) } } }
            }
            @if let Some(exit) = observed.last_exit {
                tr { th { "Last end of etcd" } td { "code " (exit.code) " after " (exit.ran_ms / 1000) " s, " (ago(exit.unix_ms, shown.now)) } }
            }
        }
    }
}

fn backups(shown: &View<'_>) -> Markup {
    let Some(store) = shown.store else {
        return html! { p { "No store is given: there are no backups, the data is only checked." } };
    };
    let observed = shown.observed;
    html! {
        table {
            tr { th { "Store" } td { code { (store) } } }
            tr { th { "Backed up by" } td id="active" { (backed_up_by(observed)) } }
            @if let Some(error) = &shown.trouble { tr { th { "Trouble" } td { span.badge.bad { (error) } } } }
            @if let Some(seconds) = shown.unsaved_seconds {
                tr { th { "Would be lost now" } td id="lag" { (format!("{seconds:.0} s")) } }
            }
            @if let Some(verified) = &observed.verified {
                tr { th { "Last restored to verify" } td { "revision " (verified.revision) ", " (ago(verified.unix_ms, shown.now)) ", in " (format!("{:.1} s", verified.seconds)) } }
            }
        }
        @match &shown.catalog {
            None => {}
            Some(Err(error)) => p { span.badge.bad { "The store cannot be listed: " (error) } }
            Some(Ok(catalog)) if catalog.timelines.is_empty() => p { "Nothing is in the store yet." }
            Some(Ok(catalog)) => {
                @for (timeline, history) in catalog.timelines.iter().rev().take(MOST_TIMELINES) {
                    (drawn(*timeline, history, shown.now))
                }
            }
        }
    }
}

fn backed_up_by(observed: &Observed) -> &'static str {
    match (observed.backing_up, observed.role) {
        (true, _) => "this sidecar",
        (false, Some(Role::Leader)) => "nobody now: this member leads, and its backup has not begun",
        (false, Some(_)) => "the sidecar of the member that leads",
        (false, None) => "nobody from here: the member is not reached",
    }
}

/// A timeline: what can be restored, and a picture of its objects over time.
fn drawn(timeline: Timeline, history: &History, now: DateTime<Utc>) -> Markup {
    let (first, last) = (history.times().min().unwrap_or_default(), history.times().max().unwrap_or_default());
    let span = last.saturating_sub(first).max(1);
    let at = |unix_ms: i64| 10 + unix_ms.saturating_sub(first).saturating_mul(WIDTH - 20) / span;
    let gaps = history.gaps();
    let restorable = history.restorable();
    html! {
        h3 { "Timeline " (timeline) }
        p.window {
            (history.fulls.len()) " full snapshots, " (history.deltas.len()) " deltas, " (bytes(history.size())) ". "
            @if restorable.is_empty() { span.badge.bad { "Nothing can be restored from it." } }
            @for run in &restorable {
                "Any revision from " (run.first) " to " (run.last) " can be restored, " (time(run.first_unix_ms)) " to " (time(run.last_unix_ms)) " (" (ago(run.last_unix_ms, now)) "). "
            }
            @for gap in &gaps { span.badge.bad { "Revisions after " (gap.after) " and before " (gap.before) " are missing." } }
        }
        svg viewBox=(format!("0 0 {WIDTH} {HEIGHT}")) role="img" aria-label=(format!("Objects of timeline {timeline}")) {
            title { "Full snapshots are tall, deltas short; from " (time(first)) " to " (time(last)) }
            @for delta in history.deltas.iter().rev().take(MOST_DRAWN) {
                rect.delta x=(at(delta.unix_ms)) y="24" width="2" height="14" fill="#5b8dc9" {}
            }
            @for full in history.fulls.iter().rev().take(MOST_DRAWN) {
                rect.full x=(at(full.unix_ms)) y="8" width="4" height="30" fill="#2e9e5b" {}
            }
        }
    }
}

fn members(shown: &View<'_>) -> Markup {
    let own = shown.observed.status.as_ref();
    let leader = own.map_or(0, |status| status.leader_id);
    html! {
        table {
            tr { th { "Name" } th { "Id" } th { "Part" } th { "Clients" } th { "Peers" } }
            @for member in shown.members {
                tr.member {
                    td { @if member.name.is_empty() { "not started yet" } @else { (member.name) } }
                    td { code { (format!("{:x}", member.id)) } }
                    td { @if member.id == leader { "leads" } @else if member.is_learner { "learns" } @else { "votes" } }
                    td { code { (member.client_urls.join(", ")) } }
                    td { code { (member.peer_urls.join(", ")) } }
                }
            }
        }
    }
}

fn ago(unix_ms: i64, now: DateTime<Utc>) -> String {
    let seconds = now.timestamp_millis().saturating_sub(unix_ms) / 1000;
    match seconds {
        ..0 => "in the future".to_owned(),
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} minutes ago", seconds / 60),
        _ => format!("{} hours ago", seconds / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_from_outside_is_escaped() {
        let (observed, phase) = (Observed::default(), Phase::New);
        let names = [
            "t00000001/full/00000000000000000005-1700000000000.db.zst",
            "t00000001/delta/00000000000000000009-00000000000000000012-1700000020000.delta.zst",
        ];
        let catalog = Catalog::new(names.map(|name| (name.to_owned(), 100)));
        let shown = View {
            name: "<b>",
            phase: &phase,
            observed: &observed,
            store: Some("file:///a?b=<c>"),
            catalog: Some(Ok(&catalog)),
            unsaved_seconds: None,
            trouble: Some("<script>x</script>".into()),
            members: &[],
            now: DateTime::from_timestamp(1_700_000_100, 0).unwrap_or_default(),
        };
        let text = page(&shown).into_string();
        for secret in ["<script", "<b>", "<c>"] {
            assert!(!text.contains(secret), "{secret} in {text}");
        }
        for said in ["Any revision from 5 to 5", "after 5 and before 9 are missing", "not reached"] {
            assert!(text.contains(said), "{said} is not in {text}");
        }
        let broken = View { catalog: Some(Err("denied")), ..shown };
        assert!(page(&broken).into_string().contains("cannot be listed: denied"));
    }
}
