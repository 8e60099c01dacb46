//! The connection to one etcd member.
//!
//! Snapshot, watch and HashKV of one backup must come from the same member, so a connection is to one endpoint; with
//! several endpoints the first that answers is taken. Certificates are read anew for every connection.

mod maintenance;
mod members;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::proto::PbWatchResponse;
use etcd_client::{Client, ConnectOptions, GetOptions, WatchOptions};
use sha2::{Digest, Sha256};
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

pub use maintenance::Alarm;
pub use members::Listed;

use crate::rotation::{Pems, Rotating};
use crate::{Error, Result};

/// More than etcd sends in one message: request limit 1.5 MiB by default, watch fragments about as much.
const MOST_MESSAGE_BYTES: usize = 512 << 20;
/// Flow control: how much may be under way before we have read it.
const WINDOW_BYTES: u32 = 2 << 20;
/// Of all streams together: a watch and a snapshot that wait for us must leave room for small requests.
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;

/// What was attempted where nobody listens.
pub const CONNECT: &str = "connect";

/// Flags that say how to reach etcd, named as etcdctl names them.
#[derive(Debug, Clone, clap::Args)]
pub struct EtcdFlags {
    /// Client URLs of members, comma separated; the first that answers is used.
    #[arg(
        long,
        env = "ETCDCTL_ENDPOINTS",
        value_delimiter = ',',
        default_value = "http://127.0.0.1:2379",
        value_name = "URL,…"
    )]
    pub endpoints: Vec<String>,
    /// CA bundle to verify etcd's certificate with; the system's when not given.
    #[arg(long, env = "ETCDCTL_CACERT", value_name = "FILE")]
    pub cacert: Option<PathBuf>,
    /// Client certificate.
    #[arg(long, env = "ETCDCTL_CERT", value_name = "FILE", requires = "key")]
    pub cert: Option<PathBuf>,
    /// Key of the client certificate.
    #[arg(long, env = "ETCDCTL_KEY", value_name = "FILE", requires = "cert")]
    pub key: Option<PathBuf>,
    /// Do not verify etcd's certificate. Anyone in between can then feed wrong data into the backup.
    #[arg(long)]
    pub insecure_skip_tls_verify: bool,
    /// User, as NAME or NAME:PASSWORD.
    #[arg(long, env = "ETCDCTL_USER", hide_env_values = true, value_name = "NAME[:PASSWORD]")]
    pub user: Option<Secret>,
    /// Password of the user; better given in the environment, where `ps` does not show it.
    #[arg(long, env = "ETCDCTL_PASSWORD", hide_env_values = true, value_name = "PASSWORD", requires = "user")]
    pub password: Option<Secret>,
    /// How long to wait for a connection and for small requests, in seconds.
    #[arg(long, default_value_t = 5, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub command_timeout: u64,
    /// What the files had when they could be used.
    #[arg(skip)]
    pub(crate) rotating: Rotating<ClientTlsConfig>,
}

/// A string that does not show itself.
#[derive(Clone)]
pub struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl std::str::FromStr for Secret {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(text.to_owned()))
    }
}

impl EtcdFlags {
    fn credentials(&self) -> Result<Option<(String, Secret)>> {
        let Some(user) = &self.user else { return Ok(None) };
        match (user.0.split_once(':'), &self.password) {
            (Some((name, password)), None) => Ok(Some((name.to_owned(), Secret(password.to_owned())))),
            (_, Some(password)) => Ok(Some((user.0.clone(), password.clone()))),
            (None, None) => {
                Err(Error::invalid("--user has no password; give it as NAME:PASSWORD or in ETCDCTL_PASSWORD"))
            }
        }
    }

    fn timeout(&self) -> Duration {
        Duration::from_secs(self.command_timeout)
    }

    fn endpoint(&self, text: &str) -> Result<Endpoint> {
        let url = if text.contains("://") {
            text.to_owned()
        } else if self.cacert.is_some() || self.cert.is_some() {
            format!("https://{text}")
        } else {
            format!("http://{text}")
        };
        if !proto::config::is_plain_address(&url) {
            // It is not shown: it may have credentials in it.
            return Err(Error::invalid(
                "an endpoint is not of the form http://host:port or https://host:port; credentials are given with --user, and ETCDCTL_PASSWORD in the environment",
            ));
        }
        let endpoint = Endpoint::from_shared(url.clone())
            .map_err(|error| Error::invalid(format!("endpoint {text:?} is not a URL: {error}")))?
            .connect_timeout(self.timeout())
            .tcp_nodelay(true)
            .initial_stream_window_size(WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true);
        if !url.starts_with("https://") {
            return Ok(endpoint);
        }
        let with = |endpoint: Endpoint, tls| {
            if self.insecure_skip_tls_verify {
                endpoint.tls_config_with_verifier(tls, Arc::new(AcceptAnything))
            } else {
                endpoint.tls_config(tls)
            }
        };
        let bad =
            |error: tonic::transport::Error| Error::invalid(format!("TLS to {text}: {}", crate::error::chain(&error)));
        // Where nothing is verified there is nothing to verify with; tonic refuses both together.
        let verifies = !self.insecure_skip_tls_verify;
        let ca = self.cacert.as_ref().filter(|_| verifies);
        let read = || Pems::read(ca, self.cert.as_ref(), self.key.as_ref());
        let make = |pems: &Pems| {
            // An etcd that starts listens before it accepts, which it does only with a quorum.
            let tls = pems.of_client(self.timeout(), verifies);
            with(endpoint.clone(), tls.clone()).map(|_| tls).map_err(bad)
        };
        let tls = self.rotating.newest("to call etcd with", read, make)?;
        with(endpoint, tls).map_err(bad)
    }
}

/// Verifies nothing, for `--insecure-skip-tls-verify`.
#[derive(Debug)]
struct AcceptAnything;

impl rustls::client::danger::ServerCertVerifier for AcceptAnything {
    fn verify_server_cert(
        &self,
        _end_entity: &rustls::pki_types::CertificateDer<'_>,
        _intermediates: &[rustls::pki_types::CertificateDer<'_>],
        _server_name: &rustls::pki_types::ServerName<'_>,
        _ocsp_response: &[u8],
        _now: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &rustls::pki_types::CertificateDer<'_>,
        _dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &rustls::pki_types::CertificateDer<'_>,
        _dss: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// A member and what it said of itself when we connected.
#[derive(Clone)]
pub struct Etcd {
    client: Client,
    channel: Channel,
    credentials: Option<(String, Secret)>,
    /// For the calls that etcd-client does not have.
    token: Option<MetadataValue<Ascii>>,
    left_out_user: bool,
    endpoint: String,
    timeout: Duration,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Etcd").field("endpoint", &self.endpoint).finish()
    }
}

/// What a member is in its cluster.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Role {
    /// It leads.
    Leader,
    /// It votes.
    #[default]
    Follower,
    /// It does not vote yet.
    Learner,
}

/// What a member says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// What it is.
    pub role: Role,
    /// The cluster it belongs to.
    pub cluster_id: u64,
    /// Its id.
    pub member_id: u64,
    /// Id of the member that leads, as this one knows it; 0 when none does.
    pub leader_id: u64,
    /// Its current revision.
    pub revision: i64,
    /// Such as `3.6.16`.
    pub version: String,
    /// Raft term.
    pub raft_term: u64,
    /// Committed raft index; not below any that the revision stands for.
    pub raft_index: u64,
    /// Applied raft index; not above any that a later revision stands for.
    pub raft_applied_index: u64,
    /// Size of its database in bytes.
    pub db_size: i64,
    /// Of that, what is in use.
    pub db_size_in_use: i64,
    /// Alarms of the cluster, with the id of the member that each is of.
    pub alarms: Vec<(u64, Alarm)>,
}

/// HashKV's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveHash {
    /// CRC-32C over the rows.
    pub hash: u32,
    /// Compaction revision; 0 when never compacted.
    pub compact_revision: i64,
}

/// `AuthStatus`, which etcd-client has no call for.
#[derive(Clone, PartialEq, Eq, prost::Message)]
struct AuthStatusRequest {}

#[derive(Clone, PartialEq, Eq, prost::Message)]
struct AuthStatusResponse {
    #[prost(bool, tag = "2")]
    enabled: bool,
    #[prost(uint64, tag = "3")]
    auth_revision: u64,
}

impl Etcd {
    /// Connects to the first endpoint that answers.
    pub async fn connect(flags: &EtcdFlags) -> Result<(Self, Status)> {
        let mut last: Option<Error> = None;
        for text in &flags.endpoints {
            let connected = async {
                // A member without a leader would let a watch sleep for ever.
                let mut connected = Self::connect_to(flags, text.trim(), true).await?;
                let status = connected.current_status().await?;
                Ok((connected, status))
            };
            match connected.await {
                Ok(connected) => return Ok(connected),
                Err(error) => {
                    if let Some(before) = last.replace(error) {
                        tracing::warn!(error = %before, "endpoint does not answer");
                    }
                }
            }
        }
        Err(last.unwrap_or_else(|| Error::invalid("--endpoints names no endpoint")))
    }

    /// Connects to one endpoint, for what a learner and a member without a leader answer too.
    pub async fn reach(flags: &EtcdFlags, endpoint: &str) -> Result<(Self, Status)> {
        let mut connected = Self::connect_to(flags, endpoint, false).await?;
        let status = connected.status().await?;
        Ok((connected, status))
    }

    async fn connect_to(flags: &EtcdFlags, text: &str, require_leader: bool) -> Result<Self> {
        let endpoint = flags.endpoint(text)?;
        let credentials = flags.credentials()?;
        let fail = |op: &'static str| {
            move |source: etcd_client::Error| Error::Etcd { op, endpoint: text.to_owned(), source: Box::new(source) }
        };
        // Longer than both parts that have limits of their own: a name may take for ever to be resolved.
        let connecting = async { Ok(endpoint.connect().await?) };
        let channel = deadline(3 * flags.timeout(), connecting).await.map_err(fail(CONNECT))?;
        let anonymous = || ConnectOptions::new().with_require_leader(require_leader);
        let mut options = anonymous();
        if let Some((name, password)) = &credentials {
            options = options.with_user(name, &password.0).with_auto_token_refresh(true);
        }
        let connecting = |options| Client::from_channel(etcd_client::Channel::Tonic(channel.clone()), Some(options));
        let mut left_out_user = false;
        let client = match deadline(flags.timeout(), connecting(options.clone())).await {
            // As etcdctl does: a user is no obstacle where none is needed.
            Err(error) if auth_is_off(&error) => {
                left_out_user = true;
                deadline(flags.timeout(), connecting(anonymous())).await
            }
            connected => connected,
        };
        let client = client.map_err(fail("authenticate"))?;
        let (endpoint, timeout) = (text.to_owned(), flags.timeout());
        Ok(Self { client, channel, credentials, token: None, left_out_user, endpoint, timeout })
    }

    /// Whether a user was given and not used, because auth was off when we connected.
    pub fn left_out_user(&self) -> bool {
        self.left_out_user
    }

    /// The endpoint, for messages.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    fn fail(&self, op: &'static str) -> impl FnOnce(etcd_client::Error) -> Error {
        let endpoint = self.endpoint.clone();
        move |source| Error::Etcd { op, endpoint, source: Box::new(source) }
    }

    /// Asks the member about itself once it has caught up with its cluster. Fails where there is no quorum.
    pub async fn current_status(&mut self) -> Result<Status> {
        let options = GetOptions::new().with_count_only();
        deadline(self.timeout, self.client.get("\0", Some(options)))
            .await
            .map_err(self.fail("read from the cluster"))?;
        self.status().await
    }

    /// Asks the member about itself.
    pub async fn status(&mut self) -> Result<Status> {
        let response = deadline(self.timeout, self.client.status()).await.map_err(self.fail("ask for the status"))?;
        let header = response.header();
        let member_id = header.map_or(0, etcd_client::ResponseHeader::member_id);
        let role = match response.is_learner() {
            true => Role::Learner,
            false if response.leader() == member_id => Role::Leader,
            false => Role::Follower,
        };
        Ok(Status {
            role,
            cluster_id: header.map_or(0, etcd_client::ResponseHeader::cluster_id),
            member_id,
            leader_id: response.leader(),
            revision: header.map_or(0, etcd_client::ResponseHeader::revision),
            version: response.version().to_owned(),
            raft_term: response.raft_term(),
            raft_index: response.raft_index().max(response.raft_applied_index()),
            raft_applied_index: response.raft_applied_index(),
            db_size: response.db_size(),
            db_size_in_use: response.raft_used_db_size(),
            alarms: response.errors().iter().filter_map(|error| Alarm::parse(error)).collect(),
        })
    }

    /// HashKV at a revision. Walks etcd's whole database, so give it time.
    pub async fn hash_kv(&mut self, revision: i64) -> Result<LiveHash> {
        let long = Duration::from_secs(120);
        let response = deadline(long, self.client.hash_kv(revision)).await.map_err(self.fail("ask for the hash"))?;
        Ok(LiveHash { hash: response.hash(), compact_revision: response.compact_version().max(0) })
    }

    /// Opens the snapshot stream.
    pub async fn snapshot(&mut self) -> Result<etcd_client::SnapshotStreaming> {
        deadline(self.timeout, self.client.snapshot()).await.map_err(self.fail("ask for a snapshot"))
    }

    /// Reads the next piece of a snapshot stream.
    pub async fn next_piece(
        &self,
        stream: &mut etcd_client::SnapshotStreaming,
    ) -> Result<Option<etcd_client::SnapshotResponse>> {
        // A defragmentation holds the stream up; longer than this, nothing comes any more.
        deadline(Duration::from_secs(60), stream.message()).await.map_err(self.fail("read the snapshot"))
    }

    /// Watches every key from a revision on, in fragments, with progress notifications.
    pub async fn watch(&self, from: i64) -> Result<etcd_client::WatchStream> {
        let options =
            WatchOptions::new().with_all_keys().with_start_revision(from).with_fragment().with_progress_notify();
        let mut watch = self.client.watch_client().max_decoding_message_size(MOST_MESSAGE_BYTES);
        deadline(self.timeout, watch.watch("", Some(options))).await.map_err(self.fail("watch"))
    }

    /// The next message of a watch with everything up to `have`. A watch that ends is an error: [`Error::Compacted`] when
    /// etcd no longer has what comes next.
    pub async fn next_message(&self, watch: &mut etcd_client::WatchStream, have: i64) -> Result<PbWatchResponse> {
        let fail = self.fail("read the watch");
        let message = match watch.message().await {
            Ok(Some(message)) => message.0,
            Ok(None) => return Err(fail(tonic::Status::unavailable("the watch ended").into())),
            Err(error) => return Err(fail(error)),
        };
        if !message.canceled {
            return Ok(message);
        }
        if message.compact_revision > 0 {
            return Err(Error::Compacted { have, compacted: message.compact_revision });
        }
        let why = format!("etcd cancelled the watch: {}", message.cancel_reason);
        let denied = message.cancel_reason.contains("permission denied");
        let status = if denied { tonic::Status::permission_denied(why) } else { tonic::Status::unavailable(why) };
        Err(fail(status.into()))
    }

    /// The compaction revision, given the last one known. One request when nothing changed.
    pub async fn compact_revision(&mut self, known: i64) -> Result<i64> {
        let at = known.max(1);
        // A lookup of a key that cannot exist at the oldest revision there is: cheap, and fails once that is compacted.
        let options = GetOptions::new().with_revision(at).with_serializable().with_limit(1).with_keys_only();
        match deadline(self.timeout, self.client.get("\0", Some(options))).await {
            Ok(_) => return Ok(known),
            Err(etcd_client::Error::GRpcStatus(status)) if status.code() == tonic::Code::OutOfRange => {}
            Err(error) => return Err(self.fail("ask for the compaction revision")(error)),
        }
        // A watch from a compacted revision is cancelled at once, and says where the compaction is.
        let options = WatchOptions::new().with_start_revision(at);
        let mut stream =
            deadline(self.timeout, self.client.watch("\0", Some(options))).await.map_err(self.fail("watch"))?;
        loop {
            let message = deadline(self.timeout, stream.message()).await.map_err(self.fail("watch"))?;
            let Some(message) = message else { return Ok(known) };
            if message.canceled() || message.compact_revision() > 0 {
                return Ok(message.compact_revision().max(known));
            }
        }
    }

    /// Ids of all leases.
    pub async fn leases(&mut self) -> Result<Vec<i64>> {
        let response = deadline(self.timeout, self.client.leases()).await.map_err(self.fail("list the leases"))?;
        Ok(response.leases().iter().map(etcd_client::LeaseStatus::id).collect())
    }

    /// Granted TTL of a lease, in seconds; 0 when it is gone.
    pub async fn lease_ttl(&mut self, id: i64) -> Result<i64> {
        match deadline(self.timeout, self.client.lease_time_to_live(id, None)).await {
            Ok(response) => Ok(if response.ttl() < 0 { 0 } else { response.granted_ttl() }),
            Err(etcd_client::Error::GRpcStatus(status)) if status.code() == tonic::Code::NotFound => Ok(0),
            Err(error) => Err(self.fail("ask for a lease")(error)),
        }
    }

    /// The auth revision, or `None` where the version (3.4) does not tell it.
    pub async fn auth_revision(&mut self) -> Result<Option<(u64, bool)>> {
        let mut asked = deadline(self.timeout, auth_status(self.channel.clone(), self.token.clone())).await;
        if let Err(etcd_client::Error::GRpcStatus(status)) = &asked
            && self.credentials.is_some()
            && (matches!(status.code(), tonic::Code::Unauthenticated | tonic::Code::InvalidArgument)
                // Without a token it is who the client certificate names, whom etcd need not know, or let do this.
                || self.token.is_none()
                    && matches!(status.code(), tonic::Code::FailedPrecondition | tonic::Code::PermissionDenied))
        {
            // Making a token costs etcd a password check and an entry in its log, so one is kept for as long as it is good.
            self.token = self.new_token().await?;
            asked = deadline(self.timeout, auth_status(self.channel.clone(), self.token.clone())).await;
        }
        match asked {
            Ok(response) => Ok(Some((response.auth_revision, response.enabled))),
            Err(etcd_client::Error::GRpcStatus(status)) if status.code() == tonic::Code::Unimplemented => Ok(None),
            Err(error) => Err(self.fail("ask for the auth revision")(error)),
        }
    }

    async fn new_token(&mut self) -> Result<Option<MetadataValue<Ascii>>> {
        let Some((name, password)) = self.credentials.clone() else { return Ok(None) };
        let mut auth = self.client.auth_client();
        match deadline(self.timeout, auth.authenticate(name, password.0)).await {
            Ok(answer) => Ok(answer.token().parse().ok()),
            Err(error) if auth_is_off(&error) => Ok(None),
            Err(error) => Err(self.fail("authenticate")(error)),
        }
    }

    /// What is visible of users and roles, as one number: stands in for the auth revision where that cannot be asked for.
    /// A changed password does not show. It is kept with backups, so what it is made of must not change.
    pub async fn auth_fingerprint(&mut self) -> Result<u64> {
        let mut digest = Sha256::new();
        let mut add = |text: &[u8]| {
            digest.update((text.len() as u64).to_be_bytes());
            digest.update(text);
        };
        let users = deadline(self.timeout, self.client.user_list()).await.map_err(self.fail("list the users"))?;
        for user in users.users() {
            let roles = deadline(self.timeout, self.client.user_get(user.clone()))
                .await
                .map_err(self.fail("list the roles of a user"))?;
            add(b"user");
            add(user.as_bytes());
            roles.roles().iter().for_each(|role| add(role.as_bytes()));
        }
        let roles = deadline(self.timeout, self.client.role_list()).await.map_err(self.fail("list the roles"))?;
        for role in roles.roles() {
            let granted =
                deadline(self.timeout, self.client.role_get(role.clone())).await.map_err(self.fail("read a role"))?;
            add(b"role");
            add(role.as_bytes());
            for permission in granted.permissions() {
                add(&permission.get_type().to_be_bytes());
                add(permission.key());
                add(permission.range_end());
            }
        }
        let digest = digest.finalize();
        Ok(digest.first_chunk().map_or(1, |bytes| u64::from_be_bytes(*bytes)).max(1))
    }
}

/// Asks for the auth revision.
async fn auth_status(
    channel: Channel,
    token: Option<MetadataValue<Ascii>>,
) -> Result<AuthStatusResponse, etcd_client::Error> {
    let mut request = tonic::Request::new(AuthStatusRequest {});
    if let Some(token) = token {
        request.metadata_mut().insert("token", token);
    }
    let path = PathAndQuery::from_static("/etcdserverpb.Auth/AuthStatus");
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.map_err(etcd_client::Error::TransportError)?;
    let codec = tonic_prost::ProstCodec::<AuthStatusRequest, AuthStatusResponse>::default();
    Ok(grpc.unary(request, path, codec).await?.into_inner())
}

/// Whether etcd refused a user because auth is not enabled.
fn auth_is_off(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status) if status.message().contains("authentication is not enabled"))
}

async fn deadline<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, etcd_client::Error>>,
) -> Result<T, etcd_client::Error> {
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or_else(|_| Err(tonic::Status::deadline_exceeded(format!("no answer within {limit:?}")).into()))
}
