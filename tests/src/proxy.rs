//! A proxy before a store's server, where a test decides what becomes of each request. One request for each connection.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is answered as the server does.
    None,
    /// The server never sees it; this is the answer.
    Status(u16),
    /// The same, with how many seconds to wait.
    Busy(u64),
    /// The connection is reset before the server sees it.
    Reset,
    /// The server has it, and the answer is lost.
    LostAnswer,
    /// The answer comes late.
    Slow(Duration),
    /// Half of the answer's body comes, then the connection ends.
    Short,
    /// Nothing ever comes.
    Silence,
}

/// A request or an answer.
#[derive(Debug, Clone, Default)]
pub struct Message {
    /// The first line.
    pub line: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// Whole.
    pub body: Vec<u8>,
}

impl Message {
    /// An answer.
    pub fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<Vec<u8>>) -> Self {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self { line: format!("HTTP/1.1 {status} told"), headers, body: body.into() }
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    /// Status of an answer.
    pub fn status(&self) -> u16 {
        self.line.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0)
    }

    fn parse(head: &[u8]) -> Result<Self> {
        let text = String::from_utf8_lossy(head);
        let mut lines = text.split("\r\n");
        let line = lines.next().context("no first line")?.to_owned();
        let header =
            |line: &str| line.split_once(':').map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()));
        Ok(Self { line, headers: lines.filter_map(header).collect(), body: Vec::new() })
    }

    /// The head and so many bytes of the body.
    pub fn bytes(&self, length: usize, is_answer_to_head: bool) -> Vec<u8> {
        let mut text = format!("{}\r\n", self.line);
        for (name, value) in &self.headers {
            if !["content-length", "transfer-encoding", "connection"].contains(&name.as_str()) {
                text.push_str(&format!("{name}: {value}\r\n"));
            }
        }
        let announced = if is_answer_to_head { self.header("content-length").map(str::to_owned) } else { None };
        let announced = announced.unwrap_or_else(|| self.body.len().to_string());
        text.push_str(&format!("content-length: {announced}\r\nconnection: close\r\n\r\n"));
        [text.as_bytes(), self.body.get(..length).unwrap_or_default()].concat()
    }
}

async fn read_head(stream: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> Result<Option<Message>> {
    loop {
        if let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let message = Message::parse(&buffer[..end])?;
            buffer.drain(..end + 4);
            return Ok(Some(message));
        }
        if stream.read_buf(buffer).await? == 0 {
            ensure!(buffer.is_empty(), "the connection ended inside a head");
            return Ok(None);
        }
    }
}

/// Reads a request, unless the connection ends before it.
pub async fn read_request(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<Message>> {
    let mut buffer = Vec::new();
    let Some(mut request) = read_head(stream, &mut buffer).await? else { return Ok(None) };
    let length: usize = request.header("content-length").map_or(Ok(0), str::parse)?;
    while buffer.len() < length {
        ensure!(stream.read_buf(&mut buffer).await? > 0, "the connection ended inside a body");
    }
    request.body = buffer;
    Ok(Some(request))
}

/// Asks the server.
pub async fn forward(port: u16, request: &Message) -> Result<Message> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
    stream.write_all(&request.bytes(request.body.len(), false)).await?;
    let mut buffer = Vec::new();
    let mut answer = read_head(&mut stream, &mut buffer).await?.context("the server did not answer")?;
    if !request.line.starts_with("HEAD ") {
        let length: Option<usize> = answer.header("content-length").map(str::parse).transpose()?;
        while length.is_none_or(|length| buffer.len() < length) && stream.read_buf(&mut buffer).await? > 0 {}
        answer.body = if answer.header("transfer-encoding") == Some("chunked") { unchunk(&buffer)? } else { buffer };
    }
    Ok(answer)
}

fn unchunk(mut rest: &[u8]) -> Result<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = rest.windows(2).position(|window| window == b"\r\n").context("a chunk without its size")?;
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..end])?.trim(), 16)?;
        if size == 0 {
            return Ok(body);
        }
        body.extend_from_slice(rest.get(end + 2..end + 2 + size).context("a chunk is cut short")?);
        rest = &rest[end + 4 + size..];
    }
}

/// Decides what becomes of the n-th request, from 0.
pub type Decide = Arc<dyn Fn(usize, &Message) -> Fault + Send + Sync>;

/// Answers instead of the server.
pub type Serve = Arc<dyn Fn(Message) -> std::pin::Pin<Box<dyn Future<Output = Result<Message>> + Send>> + Send + Sync>;

/// A running proxy; ends when dropped.
pub struct Proxy {
    port: u16,
    seen: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Before a server on a port.
    pub async fn before(port: u16, decide: Decide) -> Result<Self> {
        Self::start(Arc::new(move |request| Box::pin(async move { forward(port, &request).await })), decide).await
    }

    /// Before whatever answers.
    pub async fn start(serve: Serve, decide: Decide) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let seen = Arc::new(AtomicUsize::new(0));
        let count = seen.clone();
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (serve, decide, count) = (serve.clone(), decide.clone(), count.clone());
                tokio::spawn(async move {
                    if let Err(error) = handle(&mut stream, &serve, &decide, &count).await {
                        eprintln!("proxy: {error:#}");
                    }
                });
            }
        });
        Ok(Self { port, seen, task })
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Requests so far.
    pub fn seen(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn handle(stream: &mut TcpStream, serve: &Serve, decide: &Decide, count: &AtomicUsize) -> Result<()> {
    let Some(request) = read_request(stream).await? else { return Ok(()) };
    let fault = decide(count.fetch_add(1, Ordering::SeqCst), &request);
    let is_head = request.line.starts_with("HEAD ");
    let reset = |stream: &TcpStream| -> io::Result<()> {
        // Closing with data that nobody read makes it a reset.
        socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO))
    };
    let answer = match fault {
        Fault::Reset => return Ok(reset(stream)?),
        Fault::Silence => return std::future::pending().await,
        Fault::Status(status) => Message::answer(status, &[], ""),
        Fault::Busy(seconds) => Message::answer(429, &[("retry-after", &seconds.to_string())], ""),
        Fault::None | Fault::LostAnswer | Fault::Slow(_) | Fault::Short => serve(request).await?,
    };
    if let Fault::Slow(delay) = fault {
        tokio::time::sleep(delay).await;
    }
    if fault == Fault::LostAnswer {
        return Ok(reset(stream)?);
    }
    let length = if fault == Fault::Short { answer.body.len() / 2 } else { answer.body.len() };
    stream.write_all(&answer.bytes(length, is_head)).await?;
    Ok(stream.shutdown().await?)
}
