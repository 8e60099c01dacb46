//! The error of this crate, and what each kind of it means for whoever handles it.

use std::io;

use futures::FutureExt;

/// Shorthand for this crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What an error calls for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Try again later.
    Transient,
    /// The state of things forbids it; do something else first.
    Precondition,
    /// What was asked makes no sense.
    Invalid,
    /// Credentials or permissions are missing.
    Denied,
    /// Bytes are damaged.
    Corrupt,
    /// Something that is needed is not there, or revisions are missing in between.
    Missing,
    /// Stopped on request.
    Cancelled,
    /// The machine refused: disk full, no such file.
    Machine,
    /// This program is wrong.
    Bug,
}

impl Class {
    /// A word for it, in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Transient => "transient",
            Self::Precondition => "precondition",
            Self::Invalid => "invalid",
            Self::Denied => "denied",
            Self::Corrupt => "corrupt",
            Self::Missing => "missing",
            Self::Cancelled => "cancelled",
            Self::Machine => "machine",
            Self::Bug => "bug",
        }
    }

    /// The exit code of a command that fails with an error of this class.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Invalid => 2,
            Self::Corrupt => 10,
            Self::Missing => 11,
            Self::Precondition => 12,
            Self::Transient | Self::Denied | Self::Cancelled | Self::Machine | Self::Bug => 1,
        }
    }

    /// Whether trouble of this class may pass by itself, so that trying again makes sense. Much that is a mistake when
    /// nothing has worked yet is an outage once it has: access is denied while credentials are rotated, a bucket is missing
    /// while it is moved.
    pub fn passes(self, has_worked: bool) -> bool {
        match self {
            Self::Transient => true,
            Self::Denied | Self::Missing | Self::Machine | Self::Corrupt => has_worked,
            Self::Precondition | Self::Invalid | Self::Cancelled | Self::Bug => false,
        }
    }
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The object store refused or failed.
    #[error("{op} {location}: {}", describe_store(source))]
    Store {
        /// What was attempted, as a verb.
        op: &'static str,
        /// URL of the object or prefix.
        location: String,
        /// Why it failed.
        source: object_store::Error,
    },
    /// etcd refused or could not be reached.
    #[error("{op} at {endpoint}: {}", describe_etcd(source))]
    Etcd {
        /// What was attempted, as a verb.
        op: &'static str,
        /// Which etcd.
        endpoint: String,
        /// Why it failed.
        source: Box<etcd_client::Error>,
    },
    /// Bytes of a database, log or backup object.
    #[error("{what}: {source}")]
    Format {
        /// Which object or file.
        what: String,
        /// What is wrong with it.
        source: etcd_format::Error,
    },
    /// A local file.
    #[error("{op} {path}: {source}{}", whose(source))]
    Io {
        /// What was attempted, as a verb.
        op: &'static str,
        /// On which file.
        path: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Bytes are damaged in a way that this crate noticed.
    #[error("{what}")]
    Corrupt {
        /// Which, and how.
        what: String,
    },
    /// A member's rows are not what other members and the backups have.
    #[error("{what}")]
    Diverged {
        /// How that shows, and what to do.
        what: String,
        /// Id of one that has what it should.
        intact: u64,
    },
    /// A timeline of ours is another cluster's, in a store that is ours.
    #[error("{what}")]
    Elsewhere {
        /// Which, and where ours is.
        what: String,
    },
    /// Something needed is not there.
    #[error("{what}")]
    Missing {
        /// What, where, and what to do.
        what: String,
    },
    /// The state of things forbids it.
    #[error("{what}")]
    Precondition {
        /// What stands in the way, and what to do.
        what: String,
    },
    /// A flag or URL makes no sense.
    #[error("{what}")]
    Invalid {
        /// Which, and what would.
        what: String,
    },
    /// etcd compacted revisions that were not backed up yet.
    #[error(
        "etcd compacted its history up to revision {compacted}; the backup has it up to {have}: revisions between are in no delta; take a full snapshot"
    )]
    Compacted {
        /// Last revision backed up.
        have: i64,
        /// What is gone.
        compacted: i64,
    },
    /// Credentials were refused.
    #[error("{what}")]
    Denied {
        /// By whom, and why.
        what: String,
    },
    /// Something outside did not answer in time.
    #[error("{what}")]
    Unanswered {
        /// What, and what becomes of it.
        what: String,
    },
    /// Stopped on request.
    #[error("stopped on request")]
    Cancelled,
    /// A broken invariant.
    #[error("internal error: {what}")]
    Bug {
        /// Which.
        what: String,
    },
}

/// What to do about a file that this user may not touch.
fn whose(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; see whose it is, and which user this runs as",
        _ => "",
    }
}

impl Error {
    pub(crate) fn format(what: impl Into<String>) -> impl FnOnce(etcd_format::Error) -> Self {
        move |source| Self::Format { what: what.into(), source }
    }

    pub(crate) fn io(op: &'static str, path: impl std::fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |source| {
            let path = path.to_string();
            // Somebody may have given a key where its file was to be named.
            let is_content = proto::config::is_content(&path);
            let path = if is_content { "what is the content of a file: give its path".to_owned() } else { path };
            Self::Io { op, path, source }
        }
    }

    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt { what: what.into() }
    }

    pub(crate) fn missing(what: impl Into<String>) -> Self {
        Self::Missing { what: what.into() }
    }

    pub(crate) fn precondition(what: impl Into<String>) -> Self {
        Self::Precondition { what: what.into() }
    }

    pub(crate) fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid { what: what.into() }
    }

    /// Does it, and has a panic, which is a bug wherever it comes from, end the attempt instead of the task: whoever tries
    /// again goes on, and says why.
    pub(crate) async fn caught<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
        let panicked = |_| Self::Bug { what: "it panicked; the log says where".to_owned() };
        std::panic::AssertUnwindSafe(work).catch_unwind().await.map_err(panicked)?
    }

    pub(crate) fn task(error: &tokio::task::JoinError) -> Self {
        Self::Bug { what: format!("a task ended unexpectedly: {error}") }
    }

    /// What this error calls for.
    pub fn class(&self) -> Class {
        match self {
            Self::Store { source, .. } => store_class(source),
            Self::Etcd { source, .. } => etcd_class(source),
            Self::Format { source, .. } => format_class(source),
            Self::Io { .. } => Class::Machine,
            Self::Corrupt { .. } => Class::Corrupt,
            Self::Missing { .. } | Self::Elsewhere { .. } => Class::Missing,
            Self::Precondition { .. } | Self::Compacted { .. } | Self::Diverged { .. } => Class::Precondition,
            Self::Invalid { .. } => Class::Invalid,
            Self::Denied { .. } => Class::Denied,
            Self::Unanswered { .. } => Class::Transient,
            Self::Cancelled => Class::Cancelled,
            Self::Bug { .. } => Class::Bug,
        }
    }
}

fn format_class(error: &etcd_format::Error) -> Class {
    match error {
        etcd_format::Error::Io { .. } => Class::Machine,
        etcd_format::Error::Gap { .. } => Class::Missing,
        etcd_format::Error::Precondition { .. } => Class::Precondition,
        etcd_format::Error::Invalid { .. } => Class::Invalid,
        _ => Class::Corrupt,
    }
}

pub(crate) fn store_class(error: &object_store::Error) -> Class {
    match error {
        object_store::Error::NotFound { .. } => Class::Missing,
        object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => Class::Precondition,
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => Class::Denied,
        object_store::Error::InvalidPath { .. } | object_store::Error::UnknownConfigurationKey { .. } => Class::Invalid,
        other => server_says(other).and_then(|(code, _)| server_class(&code)).unwrap_or(Class::Transient),
    }
}

fn etcd_class(error: &etcd_client::Error) -> Class {
    match error {
        etcd_client::Error::GRpcStatus(status) => match status.code() {
            tonic::Code::Unauthenticated | tonic::Code::PermissionDenied => Class::Denied,
            // etcd answers so to a request without a user, and to a wrong password.
            tonic::Code::InvalidArgument
                if ["user name is empty", "authentication failed"]
                    .iter()
                    .any(|text| status.message().contains(text)) =>
            {
                Class::Denied
            }
            // And so where the client certificate has a name that is no user's.
            tonic::Code::FailedPrecondition if status.message().contains("user name not found") => Class::Denied,
            // Auth changed while the request was under way.
            tonic::Code::InvalidArgument if status.message().contains("revision of auth store is old") => {
                Class::Transient
            }
            tonic::Code::FailedPrecondition | tonic::Code::OutOfRange => Class::Precondition,
            tonic::Code::InvalidArgument => Class::Invalid,
            _ => Class::Transient,
        },
        etcd_client::Error::InvalidArgs(_) | etcd_client::Error::InvalidUri(_) => Class::Invalid,
        _ => Class::Transient,
    }
}

/// What a server said in its error document, as (code, message). object_store turns some answers, all to listings among
/// them, into generic errors.
fn server_says(error: &object_store::Error) -> Option<(String, String)> {
    let object_store::Error::Generic { source, .. } = error else { return None };
    let text = chain(source.as_ref());
    let element = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        Some(rest.split_once(&format!("</{name}>"))?.0.to_owned())
    };
    match element("Code") {
        Some(code) => Some((code, element("Message").unwrap_or_default())),
        None if text.contains("403 Forbidden") => Some(("Forbidden".to_owned(), String::new())),
        None => None,
    }
}

fn server_class(code: &str) -> Option<Class> {
    match code {
        "NoSuchBucket" | "ContainerNotFound" => Some(Class::Missing),
        "AccessDenied"
        | "AuthenticationFailed"
        | "AuthorizationFailure"
        | "SignatureDoesNotMatch"
        | "InvalidAccessKeyId"
        | "ExpiredToken"
        | "InvalidToken"
        | "Forbidden" => Some(Class::Denied),
        _ => None,
    }
}

/// The innermost causes say most; a chain of wrappers that each repeat the next is noise.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}

fn describe_store(error: &object_store::Error) -> String {
    let said = server_says(error);
    let hint = match store_class(error) {
        Class::Missing => "not found",
        Class::Denied => "permission denied; check the credentials and what they may do",
        Class::Precondition => "exists already",
        _ => return said.map_or_else(|| chain(error), |(code, message)| format!("{code}: {message}")),
    };
    said.map_or_else(|| format!("{hint} ({})", chain(error)), |(code, message)| format!("{hint} ({code}: {message})"))
}

/// Whether nobody listens where etcd should.
pub(crate) fn is_refused(error: &Error) -> bool {
    transport_kinds(error).any(|kind| kind == io::ErrorKind::ConnectionRefused)
}

/// Whether somebody may be there who does not speak to us, such as one with another CA, or that does not accept yet: then it is
/// not the operating system that says that nobody is.
pub(crate) fn is_estranged(error: &Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, InvalidData, UnexpectedEof};
    let broken = [InvalidData, UnexpectedEof, ConnectionReset, ConnectionAborted, BrokenPipe];
    let mut kinds = transport_kinds(error).peekable();
    kinds.peek().is_none() || kinds.any(|kind| broken.contains(&kind))
}

/// What the operating system or TLS said when etcd was connected to.
fn transport_kinds(error: &Error) -> impl Iterator<Item = io::ErrorKind> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = match error {
        Error::Etcd { source, .. } => match source.as_ref() {
            etcd_client::Error::TransportError(error) => Some(error),
            _ => None,
        },
        _ => None,
    };
    std::iter::from_fn(move || {
        let error = cause.take()?;
        cause = error.source();
        Some(error.downcast_ref().map(io::Error::kind))
    })
    .flatten()
}

fn describe_etcd(error: &etcd_client::Error) -> String {
    match error {
        etcd_client::Error::GRpcStatus(status) => {
            let source =
                std::error::Error::source(status).map(|source| format!(": {}", chain(source))).unwrap_or_default();
            format!("{} ({:?}){source}", status.message(), status.code())
        }
        etcd_client::Error::TransportError(error) => chain(error),
        other => chain(other),
    }
}
