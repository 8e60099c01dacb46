//! What gardener/etcd-wrapper asks of its sidecar before it starts etcd, with the predecessor's exact texts.
//!
//! It polls `/initialization/status` each second; `New` has it call `/initialization/start`, `Successful` has it get `/config`,
//! anything else has it wait. How one ended is told once: whoever asks after that begins anew, as one whose etcd was restarted
//! must. The check is always the full one, whatever `mode` is asked for.
//!
//! And what others ask of the predecessor: `/snapshot/full` and `/snapshot/delta` take one, `/snapshot/latest` tells the newest.
//! A member that does not lead has the leader's sidecar take it, and answers 405 when that cannot be.
//!
//! As the predecessor does, all of it answers to any method. Unlike there it needs a certificate where TLS is on; but
//! etcd-wrapper has none, nor has Gardener, so both kinds can be opened to all. An initialization touches nothing while etcd
//! runs, and the configuration has no secrets in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::IntoResponse;
use axum::routing::any;
use chrono::{DateTime, SecondsFormat};
use proto::sidecar as api;
use serde::Serialize;

use super::connection::Peer;
use crate::catalog::ObjectName;
use crate::client::{self, ApiFlags, failed};
use crate::etcd::Etcd;
use crate::snapshotter::{Kind, Taken};
use crate::supervise::{Phase, Supervisor};
use crate::{Class, Error};

/// How far etcd-wrapper is with an initialization.
struct Handshake {
    supervisor: Arc<Supervisor>,
    /// Whether the end of the last initialization was told.
    end_was_told: AtomicBool,
    /// Whether it has yet to be told that nothing was begun, for an etcd has the data.
    in_use_untold: AtomicBool,
}

impl Handshake {
    fn status(&self) -> &'static str {
        if self.in_use_untold.swap(false, Ordering::SeqCst) {
            return "Failed";
        }
        match &*self.supervisor.phase().borrow() {
            Phase::Running(_) => "Progress",
            Phase::Ready(_) if !self.end_was_told.swap(true, Ordering::SeqCst) => "Successful",
            Phase::Refused(_) | Phase::Failed(_) if !self.end_was_told.swap(true, Ordering::SeqCst) => "Failed",
            Phase::New | Phase::Ready(_) | Phase::Refused(_) | Phase::Failed(_) => "New",
        }
    }

    /// Begins an initialization where the next status would be `New`; otherwise one runs, or its end has yet to be told.
    fn start(&self) {
        let is_new = match &*self.supervisor.phase().borrow() {
            Phase::New => true,
            Phase::Running(_) => false,
            Phase::Ready(_) | Phase::Refused(_) | Phase::Failed(_) => self.end_was_told.load(Ordering::SeqCst),
        };
        if is_new {
            match &*self.supervisor.initialize("").borrow() {
                Phase::Refused(refused) if refused.in_use => self.in_use_untold.store(true, Ordering::SeqCst),
                _ => self.end_was_told.store(false, Ordering::SeqCst),
            }
        }
    }

    fn config(&self) -> Answer {
        let none = || (StatusCode::INTERNAL_SERVER_ERROR, "no initialization has succeeded\n".to_owned());
        self.supervisor.etcd_config().map_or_else(none, |config| (StatusCode::OK, config))
    }
}

/// A backup, as the predecessor tells it; its fields in its order, with its spelling.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Snapshot {
    created_on: String,
    #[serde(rename = "immutabilityExpriyTime")]
    immutability_expiry_time: &'static str,
    #[serde(rename = "versionID")]
    version_id: Option<String>,
    kind: &'static str,
    snap_dir: String,
    snap_name: String,
    prefix: String,
    compression_suffix: &'static str,
    start_revision: i64,
    last_revision: i64,
    is_chunk: bool,
    is_final: bool,
}

fn snapshot(name: &ObjectName, prefix: &str, is_final: bool) -> Snapshot {
    let (first, last_revision) = name.revisions().unwrap_or_default();
    let created = DateTime::from_timestamp_millis(name.unix_ms()).unwrap_or_default();
    let is_full = name.is_full();
    let text = name.to_string();
    // Of the predecessor's own the tree is told with the prefix, and a directory by itself.
    let (prefix, snap_dir, snap_name) = match (name, text.split('/').collect::<Vec<_>>().as_slice()) {
        (ObjectName::Gardener(_), [tree, dirs @ .., last]) => {
            let prefix = [prefix, tree].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/");
            (prefix, dirs.join("/"), (*last).to_owned())
        }
        _ => (prefix.to_owned(), String::new(), text),
    };
    let (compression_suffix, is_final) = match name {
        ObjectName::Gardener(name) => (name.codec().suffix(), name.is_final()),
        _ => (".zst", is_final),
    };
    Snapshot {
        created_on: created.to_rfc3339_opts(SecondsFormat::AutoSi, true),
        immutability_expiry_time: "0001-01-01T00:00:00Z",
        version_id: None,
        kind: if is_full { "Full" } else { "Incr" },
        snap_dir,
        snap_name,
        prefix,
        compression_suffix,
        start_revision: if is_full { 0 } else { first },
        last_revision,
        is_chunk: false,
        is_final,
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Latest {
    full_snapshot: Option<Snapshot>,
    delta_snapshots: Option<Vec<Snapshot>>,
}

/// What is told, with its status.
type Answer = (StatusCode, String);

fn json(value: &impl Serialize) -> Answer {
    match serde_json::to_string(value) {
        Ok(json) => (StatusCode::OK, json),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// As the predecessor has it: 405 for what this member cannot do, 500 for what failed.
fn refused(error: &Error) -> Answer {
    let code = match error.class() {
        Class::Precondition => StatusCode::METHOD_NOT_ALLOWED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    (code, format!("{error}\n"))
}

fn not_allowed(error: &Error) -> Answer {
    (StatusCode::METHOD_NOT_ALLOWED, format!("{error}\n"))
}

/// How the sidecars of the other members are called.
#[derive(Debug, Clone)]
pub(super) struct Peers {
    pub api: ApiFlags,
    /// They listen on the same.
    pub port: u16,
    pub is_tls: bool,
}

impl Peers {
    /// Has the leader's sidecar take a snapshot; its name, and whether it is final, when anything had changed. 405 where it cannot be asked; what it
    /// fails with is told as if it were asked itself.
    async fn take(&self, supervisor: &Supervisor, kind: Kind) -> Result<Option<(ObjectName, bool)>, Answer> {
        let sidecar = self.leader(supervisor).await.map_err(|error| not_allowed(&error))?;
        let answers = |(code, text): Answer| (code, format!("the leader's sidecar, at {sidecar}: {text}"));
        let api = ApiFlags { sidecar: sidecar.clone(), ..self.api.clone() };
        let is_final = kind == Kind::Final;
        let kind = if kind == Kind::Delta { api::Kind::Delta } else { api::Kind::Full };
        // Where the connection broke it may have been taken: with the same id it is not taken twice.
        let request = api::TakeSnapshotRequest { kind: kind.into(), request_id: client::request_id(), is_final };
        let mut attempt = 0;
        let taken = loop {
            let mut client = api.connect().await.map_err(|error| answers(not_allowed(&error)))?;
            match client.take_snapshot(request.clone()).await {
                Ok(taken) => break taken,
                // What it did not say itself is of the connection.
                Err(status) if attempt == 0 && std::error::Error::source(&status).is_some() => attempt += 1,
                Err(status) => return Err(answers(refused(&failed("take a snapshot")(status)))),
            }
        };
        let Some(taken) = taken.into_inner().snapshots.pop() else { return Ok(None) };
        let name = ObjectName::parse(&taken.name);
        let unknown =
            || Error::Unanswered { what: format!("it has taken {:?}, which is no name known here", taken.name) };
        name.map(|name| Some((name, taken.is_final))).ok_or_else(|| answers(refused(&unknown())))
    }

    /// Where the leader's sidecar is.
    async fn leader(&self, supervisor: &Supervisor) -> Result<String, Error> {
        let (mut etcd, status) = Etcd::connect(&supervisor.settings().etcd).await?;
        let members = etcd.members().await?;
        let leader = members.iter().find(|member| member.id == status.leader_id);
        let url = leader.and_then(|leader| leader.client_urls.first()).and_then(|url| url::Url::parse(url).ok());
        let host = url.as_ref().and_then(url::Url::host_str);
        let host = host.ok_or_else(|| {
            Error::precondition("no member leads that clients could reach: see to advertise-client-urls of etcd")
        })?;
        let scheme = if self.is_tls { "https" } else { "http" };
        Ok(format!("{scheme}://{host}:{}", self.port))
    }
}

async fn take(supervisor: &Supervisor, peers: &Peers, kind: Kind) -> Answer {
    match supervisor.take(kind).await {
        Ok(Taken::Full(full)) => json(&snapshot(&full.name, "", full.is_final)),
        Ok(Taken::Deltas(deltas)) => json(&deltas.last().map(|delta| snapshot(&delta.name, "", false))),
        Ok(Taken::Nothing(_)) => json(&None::<Snapshot>),
        Err(_) if supervisor.follows() => match peers.take(supervisor, kind).await {
            Ok(taken) => json(&taken.map(|(name, is_final)| snapshot(&name, "", is_final))),
            Err(answer) => answer,
        },
        Err(error) => refused(&error),
    }
}

async fn latest(supervisor: &Supervisor) -> Answer {
    let looked = async {
        let store = supervisor.store()?;
        let catalog = store.catalog().await?;
        let chain = catalog.newest_chain();
        let Some((timeline, chain)) = chain else { return Ok(None) };
        let prefix = store.url().splitn(4, '/').nth(3).unwrap_or_default().to_owned();
        let deltas = chain.deltas.iter().map(|delta| snapshot(&delta.name(timeline), &prefix, false)).collect();
        let full = chain.full.name(timeline);
        let is_final = match store.meta(&full, chain.full.size).await {
            Ok(meta) => meta.is_some_and(|meta| meta.is_final),
            // A verification tells.
            Err(error) if error.class() == Class::Corrupt => false,
            Err(error) => return Err(error),
        };
        Ok::<_, Error>(Some((snapshot(&full, &prefix, is_final), deltas)))
    };
    match looked.await {
        Ok(Some((full, deltas))) => {
            // A list of Go that nothing was put into.
            let delta_snapshots = Some(deltas).filter(|deltas: &Vec<_>| !deltas.is_empty());
            json(&Latest { full_snapshot: Some(full), delta_snapshots })
        }
        Ok(None) => json(&Latest { full_snapshot: None, delta_snapshots: None }),
        Err(error) => refused(&error),
    }
}

/// Go's `strconv.ParseBool`.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Who may ask, and over what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Access {
    pub is_tls: bool,
    /// Whether everybody may ask before etcd starts, as etcd-wrapper does,
    pub is_wrapper_answered: bool,
    /// and for snapshots, as Gardener does.
    pub are_snapshots_open: bool,
}

impl Access {
    /// Lets only those in who may be, with the headers of the predecessor.
    fn guard(self, router: Router, is_open: bool) -> Router {
        if !self.is_tls {
            return router;
        }
        router.layer(middleware::from_fn(move |request: Request, next: Next| async move {
            let mut response = if is_open || Peer::is_known(request.extensions()) {
                next.run(request).await
            } else {
                (StatusCode::UNAUTHORIZED, "this call needs a client certificate\n").into_response()
            };
            let headers = response.headers_mut();
            headers.insert(header::STRICT_TRANSPORT_SECURITY, HeaderValue::from_static("max-age=31536000"));
            headers.insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static("default-src 'self'"));
            response
        }))
    }
}

/// Everything that the predecessor answers.
pub(super) fn routes(supervisor: &Arc<Supervisor>, peers: Peers, access: Access) -> Router {
    let handshake = access.guard(handshake(supervisor.clone()), access.is_wrapper_answered);
    handshake.merge(access.guard(snapshots(supervisor.clone(), peers), access.are_snapshots_open))
}

fn snapshots(supervisor: Arc<Supervisor>, peers: Peers) -> Router {
    let (of_full, of_delta, of_latest) = (supervisor.clone(), supervisor.clone(), supervisor);
    let (leader_for_full, leader_for_delta) = (peers.clone(), peers);
    let full = move |request: Request| async move {
        let pairs = url::form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes());
        // The first counts, and an empty one as none.
        let asked = pairs.filter(|(name, _)| name == "final").map(|(_, value)| value).next();
        let asked = asked.filter(|value| !value.is_empty()).map(|value| parse_bool(&value));
        match asked {
            Some(None) => (StatusCode::BAD_REQUEST, "final is neither true nor false\n".to_owned()),
            asked if asked.flatten() == Some(true) => take(&of_full, &leader_for_full, Kind::Final).await,
            _ => take(&of_full, &leader_for_full, Kind::Full).await,
        }
    };
    let delta = move || async move { take(&of_delta, &leader_for_delta, Kind::Delta).await };
    let latest = move || async move { latest(&of_latest).await };
    Router::new()
        .route("/snapshot/full", any(full))
        .route("/snapshot/delta", any(delta))
        .route("/snapshot/latest", any(latest))
}

fn handshake(supervisor: Arc<Supervisor>) -> Router {
    let handshake =
        Arc::new(Handshake { supervisor, end_was_told: AtomicBool::new(false), in_use_untold: AtomicBool::new(false) });
    let (status, start, config) = (handshake.clone(), handshake.clone(), handshake);
    let start = move || {
        start.start();
        std::future::ready(())
    };
    Router::new()
        .route("/initialization/status", any(move || std::future::ready(status.status())))
        .route("/initialization/start", any(start))
        .route("/config", any(move || std::future::ready(config.config())))
}
