//! The sidecar's API on one port: gRPC, and over HTTP `/healthz` and `/readyz` for probes, `/metrics`, a page for a person, and
//! what the predecessor answers.

mod connection;
mod gardener;
mod page;
mod places;
mod remembered;
mod service;
mod tls;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use proto::sidecar::DESCRIPTOR;
use proto::sidecar::sidecar_server::SidecarServer;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Server;
use tonic::transport::server::Connected;

pub use tls::Files;

use crate::client::ApiFlags;
use crate::supervise::Supervisor;
use crate::{Error, Result};
use connection::{Connection, Shown};
use places::Places;
use service::Api;

/// No request is larger.
const MOST_REQUEST_BYTES: usize = 64 << 10;
/// Calls of one connection at once.
const MOST_CALLS: u32 = 16;
/// How long calls that are under way may take when the sidecar ends.
const LAST_CALLS: Duration = Duration::from_secs(3);
/// Connections from this machine at once: its launcher, and whoever looks after it.
const MOST_LOCAL: usize = 512;
/// Connections at once from elsewhere that have shown a certificate.
const MOST_KNOWN: usize = 256;
/// Connections at once from elsewhere that have not, or not yet.
const MOST_STRANGERS: usize = 128;
/// A connection is asked to end when it is so old, when what is under way on it is done: who comes back is looked at with the
/// certificates of then.
const MOST_AGE: Duration = Duration::from_secs(1800);

/// How the API is reached.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Address and port.
    pub listen: SocketAddr,
    /// `None`: no TLS, and everybody may call everything.
    pub tls: Option<Files>,
    /// How the sidecars of other members are called, but for the URL.
    pub peers: ApiFlags,
    /// Whether etcd-wrapper is answered, which shows no certificate.
    pub etcd_wrapper: bool,
    /// Whether whoever asks the predecessor for a snapshot needs none.
    pub open_snapshots: bool,
}

/// Serves until `stop` is cancelled.
pub async fn serve(settings: Settings, supervisor: Arc<Supervisor>, stop: CancellationToken) -> Result<()> {
    let listen = settings.listen;
    let listener = TcpListener::bind(listen).await.map_err(Error::io("listen on", listen))?;
    let acceptor = settings.tls.clone().map(tls::Acceptor::new).transpose()?.map(Arc::new);
    let needs_certificate = acceptor.is_some();
    if !needs_certificate {
        tracing::warn!(%listen, "the API is served without TLS: everybody who reaches it may call everything");
    }
    let access = gardener::Access {
        is_tls: needs_certificate,
        is_wrapper_answered: settings.etcd_wrapper,
        are_snapshots_open: settings.open_snapshots,
    };
    if needs_certificate && settings.open_snapshots {
        tracing::warn!(%listen, "snapshots are taken for everybody who reaches the API: /snapshot/… needs no certificate");
    }
    let api = SidecarServer::new(Api::new(supervisor.clone())).max_decoding_message_size(MOST_REQUEST_BYTES);
    let api = InterceptedService::new(api, service::known_only(needs_certificate));
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<SidecarServer<Api>>().await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTOR)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|error| Error::Bug { what: format!("describe the API: {error}") })?;
    let reflection = InterceptedService::new(reflection, service::known_only(needs_certificate));
    let routes = Routes::new(api).add_service(health_service).add_service(reflection);
    let mut router = routes.into_axum_router().merge(service::probes(supervisor.clone()));
    let port = listener.local_addr().map_err(Error::io("listen on", listen))?.port();
    let peers = gardener::Peers { api: settings.peers, port, is_tls: needs_certificate };
    router = router.merge(gardener::routes(&supervisor, peers, access));
    router = router.merge(page::routes(supervisor, needs_certificate));
    let router = router.layer(axum::middleware::from_fn(service::not_found));
    let router = router.layer(axum::middleware::from_fn(connection::keep));
    tracing::info!(listen = %listener.local_addr().map_err(Error::io("listen on", listen))?, "the API is served");
    let server = Server::builder()
        .accept_http1(true)
        .concurrency_limit_per_connection(MOST_CALLS as usize)
        // What is answered and not read waits in memory.
        .max_concurrent_streams(Some(MOST_CALLS))
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .max_connection_age(MOST_AGE)
        .add_routes(Routes::from(router));
    let stopped = stop.clone();
    let serving = async {
        if let Some(acceptor) = acceptor {
            let accept = move |stream| {
                let acceptor = acceptor.clone();
                async move { acceptor.accept(stream).await }
            };
            server.serve_with_incoming_shutdown(connections(listener, accept), stop.cancelled()).await
        } else {
            let accept = |stream| std::future::ready(Ok(stream));
            server.serve_with_incoming_shutdown(connections(listener, accept), stop.cancelled()).await
        }
    };
    let served = tokio::select! {
        served = serving => served,
        // Who does not end a call must not hold up the end.
        () = async { stopped.cancelled().await; tokio::time::sleep(LAST_CALLS).await } => Ok(()),
    };
    served.map_err(|error| Error::Unanswered {
        what: format!("serve the API on {listen}: {}", crate::error::chain(&error)),
    })
}

/// Connections whose handshake is done. Each has its own task: one that stalls holds up none of the others.
fn connections<S, F>(
    listener: TcpListener,
    accept: impl Fn(TcpStream) -> F + Send + 'static,
) -> impl Stream<Item = std::io::Result<Connection<S>>>
where
    S: Connected + Send + 'static,
    S::ConnectInfo: Shown,
    F: Future<Output = std::io::Result<S>> + Send + 'static,
{
    let (ready, connections) = mpsc::channel(16);
    // Who holds all of one kind holds up nobody of another.
    let [local, known, strangers] = [MOST_LOCAL, MOST_KNOWN, MOST_STRANGERS].map(|most| Arc::new(Places::new(most)));
    tokio::spawn(async move {
        loop {
            let (stream, from) = tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok(accepted) => accepted,
                    Err(error) => {
                        tracing::warn!(%error, "accept a connection");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
                () = ready.closed() => return,
            };
            let places = if from.ip().is_loopback() { &local } else { &strangers };
            let (places, accepting, ready, known) = (places.clone(), accept(stream), ready.clone(), known.clone());
            tokio::spawn(async move {
                let Some(place) = places.take().await else {
                    tracing::debug!(%from, "too many connections: one is not taken");
                    return;
                };
                let accepted = tokio::select! {
                    accepted = accepting => accepted,
                    () = place.left() => return,
                };
                match accepted {
                    Ok(stream) => {
                        let is_known = !from.ip().is_loopback() && stream.connect_info().has_shown();
                        let better = if is_known { known.take_to_stay() } else { None };
                        drop(ready.send(Ok(Connection::new(stream, better.unwrap_or(place)))).await);
                    }
                    Err(error) => tracing::debug!(%error, "a client could not shake hands"),
                }
            });
        }
    });
    ReceiverStream::new(connections)
}
