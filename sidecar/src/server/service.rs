//! What each call does.

use std::pin::Pin;
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use futures::{Stream, StreamExt};
use proto::Message;
use proto::sidecar as api;
use proto::sidecar::sidecar_server::Sidecar;
use tokio::sync::watch;
use tokio_stream::wrappers::WatchStream;
use tonic::{Request, Response, Status};

use super::connection::Peer;
use super::remembered::{self, Remembered};
use crate::catalog::{Catalog, Delta, Full, ObjectName, Restorable, Timeline};
use crate::etcd::Role;
use crate::initialize::{Cause, Decision, Outcome, Part, Step};
use crate::snapshotter::{Kind, Taken};
use crate::store::Store;
use crate::supervise::{LastExit, Phase, Supervisor, Verified};
use crate::verify::{Level, Problem, Report};
use crate::{Class, Error};

/// What Prometheus is told the metrics are.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Who answers.
pub(super) struct Api {
    supervisor: Arc<Supervisor>,
    exited: Remembered<api::ReportExitResponse>,
    taken: Remembered<api::TakeSnapshotResponse>,
    compacted: Remembered<api::CompactResponse>,
    defragmented: Remembered<api::DefragmentResponse>,
    prepared: Remembered<api::PrepareShutdownResponse>,
}

/// Lets only those call who have shown a certificate, where that is needed.
pub(super) fn known_only(needs_certificate: bool) -> impl Fn(Request<()>) -> Result<Request<()>, Status> + Clone {
    move |request| {
        if needs_certificate && !Peer::is_known(request.extensions()) {
            return Err(Status::unauthenticated("this call needs a client certificate"));
        }
        Ok(request)
    }
}

/// A path that there is not is answered as gRPC has it, with 200, which a probe takes for health.
pub(super) async fn not_found(
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> axum::response::Response {
    let of_grpc = |headers: &header::HeaderMap| {
        let kind = headers.get(header::CONTENT_TYPE);
        kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"))
    };
    let is_plain = !of_grpc(request.headers());
    let response = next.run(request).await;
    if is_plain && of_grpc(response.headers()) {
        return (StatusCode::NOT_FOUND, "there is no such path\n").into_response();
    }
    response
}

type Answer<T> = Result<Response<T>, Status>;
type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// An error as gRPC has it.
fn status(error: &Error) -> Status {
    let text = error.to_string();
    match error.class() {
        Class::Transient => Status::unavailable(text),
        Class::Precondition => Status::failed_precondition(text),
        Class::Invalid => Status::invalid_argument(text),
        Class::Denied => Status::permission_denied(text),
        Class::Corrupt => Status::data_loss(text),
        Class::Missing => Status::not_found(text),
        Class::Cancelled => Status::cancelled(text),
        Class::Machine | Class::Bug => Status::internal(text),
    }
}

impl Api {
    pub(super) fn new(supervisor: Arc<Supervisor>) -> Self {
        let (exited, taken, compacted) = (Remembered::default(), Remembered::default(), Remembered::default());
        let (defragmented, prepared) = (Remembered::default(), Remembered::default());
        Self { supervisor, exited, taken, compacted, defragmented, prepared }
    }

    fn store(&self) -> Result<&Store, Status> {
        self.supervisor.store().map_err(|error| status(&error))
    }

    async fn catalog(&self) -> Result<Catalog, Status> {
        self.store()?.catalog().await.map_err(|error| status(&error))
    }
}

fn action(decision: Decision) -> api::Action {
    match decision {
        Decision::Keep => api::Action::Keep,
        Decision::Append => api::Action::Append,
        Decision::Restore => api::Action::Restore,
        Decision::Bootstrap => api::Action::Bootstrap,
        Decision::Join => api::Action::Join,
        // What waits has no outcome.
        Decision::Wait | Decision::Refuse { .. } => api::Action::Refuse,
    }
}

fn cause(cause: Cause) -> api::Cause {
    match cause {
        Cause::NoData => api::Cause::NoData,
        Cause::Sound => api::Cause::Sound,
        Cause::Repairable => api::Cause::Repairable,
        Cause::Behind => api::Cause::Behind,
        Cause::ForeignCluster => api::Cause::ForeignCluster,
        Cause::AnotherMember => api::Cause::AnotherMember,
        Cause::Removed => api::Cause::Removed,
        Cause::RunsElsewhere => api::Cause::RunsElsewhere,
        Cause::Damaged(Part::Database) => api::Cause::DamagedDatabase,
        Cause::Damaged(Part::Log) => api::Cause::DamagedLog,
        Cause::Damaged(Part::Snapshots) => api::Cause::DamagedSnapshots,
    }
}

fn outcome(outcome: &Outcome) -> api::Outcome {
    api::Outcome {
        action: action(outcome.done).into(),
        reason: outcome.reason.clone(),
        revision: outcome.revision,
        may_pass: outcome.done == Decision::Refuse { may_pass: true },
        cause: outcome.cause.map_or(api::Cause::Unspecified, cause).into(),
        moved_to: outcome.moved_to.as_ref().map(|path| path.display().to_string()).unwrap_or_default(),
    }
}

fn step(step: &Step) -> api::InitializeProgress {
    let (done, total) = if let Step::Restore(far) = step { (far.done, far.total) } else { (0, 0) };
    let (phase, text) = (step.phase().to_owned(), step.to_string());
    let step = api::Step::from_str_name(&format!("STEP_{}", phase.to_ascii_uppercase())).unwrap_or_default();
    api::InitializeProgress { phase, text, done, total, outcome: None, step: step.into() }
}

/// What a phase tells a caller of `Initialize`; `true` when nothing follows.
fn progress(phase: &Phase) -> (Result<api::InitializeProgress, Status>, bool) {
    let ended = |text: &str, ended: &Outcome| api::InitializeProgress {
        phase: "end".into(),
        text: text.to_owned(),
        done: 0,
        total: 0,
        outcome: Some(outcome(ended)),
        step: api::Step::End.into(),
    };
    match phase {
        Phase::New => (Ok(step(&Step::Check)), false),
        Phase::Running(running) => (Ok(step(running)), false),
        Phase::Ready(ready) => (Ok(ended("etcd may start", ready)), true),
        Phase::Refused(refused) => (Ok(ended("etcd must not start", refused)), true),
        Phase::Failed(error) => (Err(status(error)), true),
    }
}

fn until_it_ended(phases: watch::Receiver<Phase>) -> Streamed<api::InitializeProgress> {
    let told = futures::stream::unfold(Some(WatchStream::new(phases)), |phases| async {
        let mut phases = phases?;
        let (told, is_last) = progress(&phases.next().await?);
        Some((told, (!is_last).then_some(phases)))
    });
    told.boxed()
}

fn full(timeline: Timeline, full: &Full) -> api::Snapshot {
    snapshot(&full.name(timeline), timeline, full.size)
}

fn window(run: &Restorable) -> api::Window {
    let Restorable { first, last, first_unix_ms, last_unix_ms } = *run;
    api::Window { first_revision: first, last_revision: last, first_unix_ms, last_unix_ms }
}

fn delta(timeline: Timeline, delta: &Delta) -> api::Snapshot {
    snapshot(&delta.name(timeline), timeline, delta.size)
}

fn snapshot(name: &ObjectName, timeline: Timeline, bytes: u64) -> api::Snapshot {
    let (first_revision, last_revision) = name.revisions().unwrap_or_default();
    let kind = if name.is_full() { api::Kind::Full } else { api::Kind::Delta };
    let (kind, unix_ms) = (kind.into(), name.unix_ms());
    let is_final = name.is_marked_final();
    api::Snapshot { name: name.to_string(), kind, timeline, first_revision, last_revision, unix_ms, bytes, is_final }
}

fn snapshots(taken: &Taken) -> Vec<api::Snapshot> {
    match taken {
        Taken::Full(full) => {
            let told = snapshot(&full.name, timeline_of(&full.name), full.size);
            vec![api::Snapshot { is_final: full.is_final, ..told }]
        }
        Taken::Deltas(deltas) => {
            deltas.iter().map(|delta| snapshot(&delta.name, timeline_of(&delta.name), delta.size)).collect()
        }
        Taken::Nothing(_) => Vec::new(),
    }
}

/// What was found, and then how much was looked at.
fn told(report: Report) -> impl Iterator<Item = api::VerifyProgress> {
    use api::verify_progress::What;
    let problems = report.problems.len() as u64;
    let found = report.problems.into_iter().map(|problem| {
        let Problem { at, what, is_gap } = problem;
        What::Problem(api::Problem { at, what, is_gap })
    });
    let hashes = report.replayed.into_iter().flat_map(|replayed| replayed.hashes).collect();
    let summary = api::Summary { objects: report.objects, bytes: report.bytes, problems, hashes };
    let all = found.chain(report.remarks.into_iter().map(What::Remark)).chain([What::Summary(summary)]);
    all.map(|what| api::VerifyProgress { what: Some(what) })
}

fn timeline_of(name: &ObjectName) -> Timeline {
    match name {
        ObjectName::Full { timeline, .. } | ObjectName::Delta { timeline, .. } => *timeline,
        _ => 0,
    }
}

#[tonic::async_trait]
impl Sidecar for Api {
    type InitializeStream = Streamed<api::InitializeProgress>;
    type ListSnapshotsStream = Streamed<api::Snapshot>;
    type VerifyStream = Streamed<api::VerifyProgress>;

    async fn initialize(&self, request: Request<api::InitializeRequest>) -> Answer<Self::InitializeStream> {
        let id = &request.get_ref().request_id;
        remembered::check(id)?;
        Ok(Response::new(until_it_ended(self.supervisor.initialize(id))))
    }

    async fn get_etcd_config(&self, _: Request<api::GetEtcdConfigRequest>) -> Answer<api::EtcdConfig> {
        let yaml = self.supervisor.etcd_config();
        let yaml =
            yaml.ok_or_else(|| Status::failed_precondition("etcd must not start: no initialization has succeeded"))?;
        Ok(Response::new(api::EtcdConfig { yaml }))
    }

    async fn report_exit(&self, request: Request<api::ReportExitRequest>) -> Answer<api::ReportExitResponse> {
        let (whole, supervisor) = (request.get_ref().encode_to_vec(), self.supervisor.clone());
        let api::ReportExitRequest { code, ran_ms, request_id } = request.into_inner();
        let work = async move {
            supervisor.etcd_ended(code, ran_ms);
            Ok(api::ReportExitResponse {})
        };
        self.exited.once(&request_id, whole, self.supervisor.tasks(), work).await
    }

    async fn status(&self, _: Request<api::StatusRequest>) -> Answer<api::StatusResponse> {
        let phase = self.supervisor.phase().borrow().clone();
        let (name, reason, initialized) = match &phase {
            Phase::New => (api::Phase::New, String::new(), None),
            Phase::Running(running) => (api::Phase::Initializing, running.to_string(), None),
            Phase::Ready(ready) => (api::Phase::Ready, String::new(), Some(outcome(ready))),
            Phase::Refused(refused) => (api::Phase::Failed, refused.reason.clone(), Some(outcome(refused))),
            Phase::Failed(error) => (api::Phase::Failed, error.to_string(), None),
        };
        let observed = self.supervisor.observed();
        let role = match observed.role {
            None => api::Role::None,
            Some(Role::Leader) => api::Role::Leader,
            Some(Role::Follower) => api::Role::Follower,
            Some(Role::Learner) => api::Role::Learner,
        };
        let alarms = observed.alarms().iter().map(|(_, alarm)| alarm.name().to_owned()).collect();
        let last_exit =
            observed.last_exit.map(|LastExit { code, ran_ms, unix_ms }| api::EtcdExit { code, ran_ms, unix_ms });
        let member = observed.status.map(|status| api::MemberStatus {
            cluster_id: format!("{:x}", status.cluster_id),
            member_id: format!("{:x}", status.member_id),
            etcd_version: status.version,
            revision: status.revision,
            db_size: status.db_size,
        });
        let store = self.supervisor.settings().initialize.store.as_ref();
        let (listed, unlisted) = match self.supervisor.listed().await {
            None => (None, None),
            Some(Ok(catalog)) => (Some(catalog), None),
            Some(Err(why)) => (None, Some(format!("the store cannot be listed: {why}"))),
        };
        let newest = listed.as_ref().and_then(|catalog| catalog.newest_restorable());
        let chain = newest.and_then(|(timeline, history)| Some((timeline, history.newest_chain()?)));
        let backup = api::BackupStatus {
            full: chain.as_ref().map(|(timeline, chain)| full(*timeline, &chain.full)),
            delta: chain.as_ref().and_then(|(timeline, chain)| Some(delta(*timeline, chain.deltas.last()?))),
            window: newest.and_then(|(_, history)| Some(window(history.restorable().last()?))),
            unsaved_seconds: self.supervisor.unsaved_seconds(),
            store: store.map(|store| store.url().to_owned()).unwrap_or_default(),
            active: observed.backing_up,
            error: self.supervisor.trouble().or(unlisted).unwrap_or_default(),
            verified: observed.verified.map(|verified| {
                let Verified { revision, unix_ms, seconds, hashes } = verified;
                api::Verified { revision, unix_ms, seconds, hashes }
            }),
        };
        Ok(Response::new(api::StatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            phase: name.into(),
            reason,
            initialized,
            role: role.into(),
            member,
            backup: Some(backup),
            last_exit,
            alarms,
        }))
    }

    async fn take_snapshot(&self, request: Request<api::TakeSnapshotRequest>) -> Answer<api::TakeSnapshotResponse> {
        let kind = match (request.get_ref().kind(), request.get_ref().is_final) {
            (api::Kind::Full, false) => Kind::Full,
            (api::Kind::Full, true) => Kind::Final,
            (api::Kind::Delta, false) => Kind::Delta,
            (api::Kind::Delta, true) => return Err(Status::invalid_argument("only a full snapshot can be final")),
            (api::Kind::Unspecified, _) => return Err(Status::invalid_argument("say which kind: full or delta")),
        };
        let (id, whole) = (request.get_ref().request_id.clone(), request.get_ref().encode_to_vec());
        let supervisor = self.supervisor.clone();
        let work = async move {
            let taken = supervisor.take(kind).await.map_err(|error| status(&error))?;
            Ok(api::TakeSnapshotResponse { snapshots: snapshots(&taken) })
        };
        self.taken.once(&id, whole, self.supervisor.tasks(), work).await
    }

    async fn list_snapshots(&self, _: Request<api::ListSnapshotsRequest>) -> Answer<Self::ListSnapshotsStream> {
        let mut all = Vec::new();
        for (timeline, history) in self.catalog().await?.timelines {
            all.extend(history.fulls.iter().map(|found| full(timeline, found)));
            all.extend(history.deltas.iter().map(|found| delta(timeline, found)));
        }
        all.sort_by_key(|snapshot| (snapshot.timeline, snapshot.last_revision, snapshot.unix_ms));
        Ok(Response::new(futures::stream::iter(all.into_iter().map(Ok)).boxed()))
    }

    async fn get_latest(&self, _: Request<api::GetLatestRequest>) -> Answer<api::GetLatestResponse> {
        let catalog = self.catalog().await?;
        let (timeline, chain) =
            catalog.newest_chain().ok_or_else(|| Status::not_found("the store has no full snapshot"))?;
        let deltas = chain.deltas.iter().map(|found| delta(timeline, found)).collect();
        Ok(Response::new(api::GetLatestResponse { full: Some(full(timeline, &chain.full)), deltas }))
    }

    async fn verify(&self, request: Request<api::VerifyRequest>) -> Answer<Self::VerifyStream> {
        let level = match request.get_ref().level() {
            api::Level::Unspecified => return Err(Status::invalid_argument("say which level")),
            api::Level::Names => Level::Names,
            api::Level::Bytes => Level::Bytes,
            api::Level::Decode => Level::Decode,
            api::Level::Replay => Level::Replay,
        };
        self.store()?;
        let supervisor = self.supervisor.clone();
        // A caller who has gone is not read for: the stream is dropped, and what it does with it.
        let told = async move {
            let verified = supervisor.verify(level).await;
            let told: Vec<_> = match verified {
                Ok(report) => told(report).map(Ok).collect(),
                Err(error) => vec![Err(status(&error))],
            };
            futures::stream::iter(told)
        };
        Ok(Response::new(futures::stream::once(told).flatten().boxed()))
    }

    async fn compact(&self, request: Request<api::CompactRequest>) -> Answer<api::CompactResponse> {
        let whole = request.get_ref().encode_to_vec();
        let api::CompactRequest { request_id, discard_history } = request.into_inner();
        let supervisor = self.supervisor.clone();
        let work = async move {
            let compacted = supervisor.compact(discard_history, &supervisor.settings().work_dir).await;
            let compacted = compacted.map_err(|error| status(&error))?;
            let (name, revision, bytes) = (compacted.object.unwrap_or_default(), compacted.revision, compacted.bytes);
            Ok(api::CompactResponse { name, revision, bytes })
        };
        self.compacted.once(&request_id, whole, self.supervisor.tasks(), work).await
    }

    async fn defragment(&self, request: Request<api::DefragmentRequest>) -> Answer<api::DefragmentResponse> {
        let supervisor = self.supervisor.clone();
        let work = async move {
            let (before, after) = supervisor.defragment().await.map_err(|error| status(&error))?;
            Ok(api::DefragmentResponse { before, after })
        };
        self.defragmented.once(&request.get_ref().request_id, Vec::new(), self.supervisor.tasks(), work).await
    }

    async fn prepare_shutdown(
        &self,
        request: Request<api::PrepareShutdownRequest>,
    ) -> Answer<api::PrepareShutdownResponse> {
        let supervisor = self.supervisor.clone();
        let work = async move {
            let (taken, leader) = supervisor.prepare_shutdown().await.map_err(|error| status(&error))?;
            let leader_id = leader.map(|id| format!("{id:x}")).unwrap_or_default();
            Ok(api::PrepareShutdownResponse { snapshots: taken.iter().flat_map(snapshots).collect(), leader_id })
        };
        self.prepared.once(&request.get_ref().request_id, Vec::new(), self.supervisor.tasks(), work).await
    }
}

/// For probes, which have no certificate.
pub(super) fn probes(supervisor: Arc<Supervisor>) -> Router {
    let counted = supervisor.clone();
    let ready = move || {
        let is_ready = match &*supervisor.phase().borrow() {
            Phase::Ready(_) => supervisor.unreached_for_long().is_none(),
            Phase::Refused(refused) => refused.in_use,
            // A sidecar that was restarted beside an etcd that serves.
            Phase::New => supervisor.observed().role.is_some(),
            Phase::Running(_) | Phase::Failed(_) => false,
        };
        std::future::ready(if is_ready {
            (StatusCode::OK, "{\"health\":true}")
        } else {
            (StatusCode::SERVICE_UNAVAILABLE, "{\"health\":false}")
        })
    };
    // Which has no secrets: Prometheus has no certificate by default.
    let metrics = move || async move {
        match counted.metrics().await {
            Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
        }
    };
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| std::future::ready("{\"health\":true}")))
        .route("/readyz", get(ready))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_caller_hears_the_end_and_nothing_after_it() {
        let ended = Outcome {
            done: Decision::Keep,
            reason: "sound".into(),
            revision: 3,
            moved_to: None,
            in_use: false,
            joins: None,
            cause: None,
            owes: None,
        };
        let (phase, phases) = watch::channel(Phase::Running(Step::Check));
        let mut told = until_it_ended(phases);
        assert!(told.next().await.is_some_and(|told| told.is_ok_and(|told| told.phase == "check")));
        phase.send_replace(Phase::Ready(ended));
        let last = told.next().await.unwrap().unwrap().outcome.unwrap();
        assert_eq!((last.action(), last.revision), (api::Action::Keep, 3));
        assert!(told.next().await.is_none());
    }

    #[test]
    fn classes_have_codes() {
        for (error, code) in [
            (Error::missing("x"), tonic::Code::NotFound),
            (Error::corrupt("x"), tonic::Code::DataLoss),
            (Error::precondition("x"), tonic::Code::FailedPrecondition),
            (Error::invalid("x"), tonic::Code::InvalidArgument),
        ] {
            assert_eq!(status(&error).code(), code);
        }
    }
}
