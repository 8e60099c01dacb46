//! Connections of the API: so many at once, and none that is of no use for long.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::Request;
use axum::http::Extensions;
use axum::middleware::Next;
use axum::response::Response;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};
use tonic::transport::server::{Connected, TcpConnectInfo, TlsConnectInfo};

use super::places::Place;

/// A client of HTTP/2 is sent pings more often than this.
const IDLE: Duration = Duration::from_secs(60);
/// Who has not shown a certificate, where that is asked for, has nothing to do here that takes longer.
const STRANGERS: Duration = Duration::from_secs(120);

/// A connection that ends when nothing was written for a while, and nothing is being worked on: what a client sends does not
/// count, for one that never ends its request may send a byte from time to time. Over HTTP/2 pings are written, and one that
/// answers them stays, but for a stranger: that one goes after a while, whatever it does.
pub(super) struct Connection<S> {
    stream: S,
    idle: Pin<Box<Sleep>>,
    /// When a stranger goes.
    most: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// It has to go.
    is_over: bool,
    calls: Arc<AtomicUsize>,
    /// Its place among those that are allowed.
    _place: Place,
}

impl<S: Connected> Connection<S>
where
    S::ConnectInfo: Shown,
{
    pub(super) fn new(stream: S, mut place: Place) -> Self {
        let info = stream.connect_info();
        let is_stranger = !info.has_shown() && !info.is_open();
        let most: Option<Pin<Box<dyn Future<Output = ()> + Send>>> = if is_stranger {
            let left = place.left();
            Some(Box::pin(async { drop(tokio::time::timeout(STRANGERS, left).await) }))
        } else {
            place.stay();
            None
        };
        let idle = Box::pin(tokio::time::sleep(IDLE));
        Self { stream, idle, most, is_over: false, calls: Arc::default(), _place: place }
    }
}

/// Who is at the other end of a connection; each of its requests has it.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    /// Whether it has shown a certificate of the CA.
    is_known: bool,
    /// Whether nobody needs one.
    is_open: bool,
    /// How many of its requests are being worked on.
    calls: Arc<AtomicUsize>,
}

impl Peer {
    /// Whether who asks has shown a certificate of the CA.
    pub(super) fn is_known(extensions: &Extensions) -> bool {
        extensions.get::<Self>().is_some_and(|peer| peer.is_known)
    }
}

/// Says of a connection whether its client has shown a certificate that was found good.
pub(super) trait Shown {
    fn has_shown(&self) -> bool;

    /// Whether it is without TLS, where everybody may do everything.
    fn is_open(&self) -> bool;
}

impl Shown for TcpConnectInfo {
    fn has_shown(&self) -> bool {
        false
    }

    fn is_open(&self) -> bool {
        true
    }
}

impl Shown for TlsConnectInfo<TcpConnectInfo> {
    fn has_shown(&self) -> bool {
        self.peer_certs().is_some_and(|certificates| !certificates.is_empty())
    }

    fn is_open(&self) -> bool {
        false
    }
}

impl<S: Connected> Connected for Connection<S>
where
    S::ConnectInfo: Shown,
{
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        let info = self.stream.connect_info();
        Peer { is_known: info.has_shown(), is_open: info.is_open(), calls: self.calls.clone() }
    }
}

/// Keeps the connection of a request that is being worked on.
pub(super) async fn keep(request: Request, next: Next) -> Response {
    struct Call(Arc<AtomicUsize>);
    impl Drop for Call {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
    // One that is nobody may call what is answered at once; what it does not send is not waited for.
    let peer = request.extensions().get::<Peer>().filter(|peer| peer.is_known || peer.is_open);
    let call = peer.map(|peer| {
        peer.calls.fetch_add(1, Ordering::Relaxed);
        Call(peer.calls.clone())
    });
    let response = next.run(request).await;
    drop(call);
    response
}

impl<S> Connection<S> {
    /// Whether it has to go. Asked whenever there is something to wait for, in either direction: who does not read what it
    /// asked for goes too.
    fn is_over(&mut self, context: &mut Context<'_>) -> bool {
        if self.most.as_mut().is_some_and(|most| most.as_mut().poll(context).is_ready()) {
            (self.most, self.is_over) = (None, true);
        }
        while !self.is_over && self.idle.as_mut().poll(context).is_ready() {
            self.is_over = self.calls.load(Ordering::Relaxed) == 0;
            self.idle.as_mut().reset(Instant::now() + IDLE);
        }
        self.is_over
    }

    fn unless_over<T>(&mut self, context: &mut Context<'_>, polled: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if self.is_over(context) { Poll::Ready(Err(io::ErrorKind::TimedOut.into())) } else { polled }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Connection<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        self.unless_over(context, read)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Connection<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        if written.is_ready() {
            self.idle.as_mut().reset(Instant::now() + IDLE);
        }
        self.unless_over(context, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.unless_over(context, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(context);
        if shut.is_pending() { self.unless_over(context, shut) } else { shut }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::places::Places;
    use super::*;

    /// A client that has shown a certificate, or has not.
    struct Client {
        stream: tokio::io::DuplexStream,
        has_shown: bool,
    }

    #[derive(Clone)]
    struct Info(bool);

    impl Shown for Info {
        fn has_shown(&self) -> bool {
            self.0
        }

        fn is_open(&self) -> bool {
            false
        }
    }

    impl Connected for Client {
        type ConnectInfo = Info;

        fn connect_info(&self) -> Info {
            Info(self.has_shown)
        }
    }

    impl AsyncRead for Client {
        fn poll_read(
            mut self: Pin<&mut Self>,
            context: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.stream).poll_read(context, buffer)
        }
    }

    impl AsyncWrite for Client {
        fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.stream).poll_write(context, bytes)
        }

        fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.stream).poll_flush(context)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.stream).poll_shutdown(context)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stranger_goes_whatever_it_does() {
        for has_shown in [true, false] {
            let place = Places::new(1).take().await.unwrap();
            let (mut client, stream) = tokio::io::duplex(64);
            let mut connection = Connection::new(Client { stream, has_shown }, place);
            let mut answered = 0;
            for _ in 0..20 {
                tokio::time::sleep(IDLE / 4).await;
                client.write_all(b"x").await.unwrap();
                answered += usize::from(connection.read_u8().await.is_ok());
                let _ = connection.write_all(b"y").await;
            }
            assert_eq!(answered == 20, has_shown, "{answered}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn who_gets_no_answer_goes() {
        let places = Places::new(1);
        let place = places.take().await.unwrap();
        let (mut client, stream) = tokio::io::duplex(64);
        let mut connection = Connection::new(Client { stream, has_shown: true }, place);
        for _ in 0..5 {
            tokio::time::sleep(IDLE / 2).await;
            client.write_all(b"x").await.unwrap();
            assert_eq!(connection.read_u8().await.unwrap(), b'x');
            connection.write_all(b"y").await.unwrap();
        }
        // Long work, and a client that asks again meanwhile.
        connection.calls.store(1, Ordering::Relaxed);
        assert!(tokio::time::timeout(IDLE * 5, connection.read_u8()).await.is_err());
        client.write_all(b"x").await.unwrap();
        assert_eq!(connection.read_u8().await.unwrap(), b'x');
        connection.calls.store(0, Ordering::Relaxed);
        // A byte from time to time, and never a whole request.
        let mut ended = None;
        for _ in 0..20 {
            client.write_all(b"x").await.unwrap();
            tokio::time::sleep(IDLE / 7).await;
            if let Err(error) = connection.read_u8().await {
                ended = Some(error.kind());
                break;
            }
        }
        assert_eq!(ended, Some(io::ErrorKind::TimedOut));
        assert!(places.take().await.is_none());
        drop(connection);
        assert!(places.take().await.is_some());
    }
}
