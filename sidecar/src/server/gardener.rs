//! What gardener/etcd-wrapper asks of its sidecar before it starts etcd, with the predecessor's exact texts.
//!
//! It polls `/initialization/status` each second; `New` has it call `/initialization/start`, `Successful` has it get `/config`,
//! anything else has it wait. An end is told once: whoever asks again begins anew, as one whose etcd was restarted must. The
//! check is always the full one, whatever `mode` is asked for.
//!
//! None of these needs a certificate, for etcd-wrapper has none; they are served only where that is configured. An
//! initialization touches nothing while etcd runs, and the configuration has no secrets in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;

use crate::supervise::{Phase, Supervisor};

/// One that asks.
struct Wrapper {
    supervisor: Arc<Supervisor>,
    /// Whether the end of the last initialization was told.
    told: AtomicBool,
}

impl Wrapper {
    fn status(&self) -> &'static str {
        let text = match &*self.supervisor.phase().borrow() {
            Phase::New => return "New",
            Phase::Running(_) => return "Progress",
            Phase::Ready(_) => "Successful",
            Phase::Refused(_) | Phase::Failed(_) => "Failed",
        };
        if self.told.swap(true, Ordering::SeqCst) { "New" } else { text }
    }

    /// Begins an initialization where the next status would be `New`; otherwise one runs, or its end has yet to be told.
    fn start(&self) {
        let is_new = match &*self.supervisor.phase().borrow() {
            Phase::New => true,
            Phase::Running(_) => false,
            Phase::Ready(_) | Phase::Refused(_) | Phase::Failed(_) => self.told.load(Ordering::SeqCst),
        };
        if is_new {
            self.supervisor.initialize();
            self.told.store(false, Ordering::SeqCst);
        }
    }

    fn config(&self) -> (StatusCode, String) {
        match self.supervisor.etcd_config() {
            Some(config) => (StatusCode::OK, config),
            None => (StatusCode::INTERNAL_SERVER_ERROR, "no initialization has succeeded\n".to_owned()),
        }
    }
}

pub(super) fn routes(supervisor: Arc<Supervisor>) -> Router {
    let wrapper = Arc::new(Wrapper { supervisor, told: AtomicBool::new(false) });
    let (status, start, config) = (wrapper.clone(), wrapper.clone(), wrapper);
    let start = move || {
        start.start();
        std::future::ready(())
    };
    Router::new()
        .route("/initialization/status", get(move || std::future::ready(status.status())))
        .route("/initialization/start", get(start.clone()).post(start))
        .route("/config", get(move || std::future::ready(config.config())))
}
