//! The objects of a restore, fetched and decompressed ahead of their use. What is ahead is bounded.

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use bytes::Bytes;
use futures::StreamExt;
use proto::backup::ObjectMeta;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::catalog::ObjectName;
use crate::object::Content;
use crate::store::Store;
use crate::{Error, Result};

/// Pieces fetched ahead of the one being decoded, 2 MiB each at most.
const PIECES_AHEAD: usize = 2;
/// Decompressed bytes handed on at once.
const CHUNK_BYTES: usize = 128 << 10;
/// Chunks decompressed ahead of the one being read.
const CHUNKS_AHEAD: usize = 3;

/// Part of an object on its way; `None` ends the object.
pub(crate) type Piece = Result<Option<Bytes>>;

/// The objects of a restore, one after the other, as they arrive.
pub(crate) type Pieces = mpsc::Receiver<Piece>;

/// Fetches all objects in order, ahead of their use.
pub(crate) fn fetch(
    store: Store,
    objects: Vec<(ObjectName, u64)>,
    stop: CancellationToken,
) -> (JoinHandle<()>, Pieces) {
    let (pieces, received) = mpsc::channel(PIECES_AHEAD);
    let fetching = async move {
        tokio::select! {
            () = feed(store, objects, pieces.clone()) => {}
            () = stop.cancelled() => drop(pieces.send(Err(Error::Cancelled)).await),
        }
    };
    (tokio::spawn(fetching), received)
}

async fn feed(store: Store, objects: Vec<(ObjectName, u64)>, pieces: mpsc::Sender<Piece>) {
    let requests =
        objects.into_iter().flat_map(|(name, size)| Store::ranges(size).map(move |range| (name, size, range)));
    let fetched = futures::stream::iter(requests.map(move |(name, size, range)| {
        let store = store.clone();
        async move {
            let last = range.end >= size;
            store.get_range(&name, range).await.map(|bytes| (bytes, last))
        }
    }))
    .buffered(Store::RANGES_AHEAD);
    let mut fetched = std::pin::pin!(fetched);
    while let Some(piece) = fetched.next().await {
        let sent = match piece {
            Ok((bytes, last)) => {
                let sent = pieces.send(Ok(Some(bytes))).await;
                if last && sent.is_ok() { pieces.send(Ok(None)).await } else { sent }
            }
            Err(error) => pieces.send(Err(error)).await,
        };
        if sent.is_err() {
            return;
        }
    }
}

/// Reads one object from the pieces that arrive.
pub(crate) struct PieceReader<'r> {
    received: &'r mut Pieces,
    current: Bytes,
    ended: bool,
}

impl<'r> PieceReader<'r> {
    pub(crate) fn new(received: &'r mut Pieces) -> Self {
        Self { received, current: Bytes::new(), ended: false }
    }
}

impl Read for PieceReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            if self.ended {
                return Ok(0);
            }
            match self.received.blocking_recv() {
                Some(Ok(Some(bytes))) => self.current = bytes,
                Some(Ok(None)) => self.ended = true,
                Some(Err(error)) => return Err(io::Error::other(error)),
                None => {
                    return Err(io::Error::other(Error::Bug { what: "fetching ended before the objects did".into() }));
                }
            }
        }
        let length = buf.len().min(self.current.len());
        buf.get_mut(..length).unwrap_or_default().copy_from_slice(&self.current.split_to(length));
        Ok(length)
    }
}

/// Fails once somebody asked to stop.
pub(crate) struct Stoppable<'s, R> {
    inner: R,
    stop: &'s CancellationToken,
}

impl<'s, R> Stoppable<'s, R> {
    pub(crate) fn new(inner: R, stop: &'s CancellationToken) -> Self {
        Self { inner, stop }
    }
}

impl<R: Read> Read for Stoppable<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.stop.is_cancelled() {
            return Err(io::Error::other(Error::Cancelled));
        }
        self.inner.read(buf)
    }
}

/// Decompressed objects on their way from [`Ahead`] to [`Arriving`].
enum Part {
    /// An object begins.
    Begin(Option<Box<ObjectMeta>>),
    /// So much of it.
    Content(Vec<u8>),
    /// It ended.
    End,
}

/// Both ends of decompressing ahead.
pub(super) fn decompressed() -> (Ahead, Arriving) {
    let (parts, arriving) = sync_channel(CHUNKS_AHEAD);
    let (used, reusable) = sync_channel(CHUNKS_AHEAD + 2);
    (Ahead { parts, reusable }, Arriving { parts: arriving, used })
}

/// Decompresses objects.
pub(super) struct Ahead {
    parts: SyncSender<Result<Part>>,
    reusable: Receiver<Vec<u8>>,
}

impl Ahead {
    /// Works until everything is handed on, nobody takes it any more, or an error is.
    pub(super) fn run(self, objects: &[(ObjectName, String)], received: &mut Pieces, stop: &CancellationToken) {
        for (name, location) in objects {
            match self.object(name, location, received, stop) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    let _ = self.parts.send(Err(error));
                    return;
                }
            }
        }
    }

    fn object(
        &self,
        name: &ObjectName,
        location: &str,
        received: &mut Pieces,
        stop: &CancellationToken,
    ) -> Result<bool> {
        let source = Stoppable::new(PieceReader::new(received), stop);
        let mut source = Content::open(name, source, location)?;
        let meta = source.meta().cloned().map(Box::new);
        if self.parts.send(Ok(Part::Begin(meta))).is_err() {
            return Ok(false);
        }
        loop {
            let mut chunk = self.reusable.try_recv().unwrap_or_else(|_| Vec::with_capacity(CHUNK_BYTES));
            let read = source.by_ref().take(CHUNK_BYTES as u64).read_to_end(&mut chunk);
            let ended = read.map_err(|error| error.downcast().unwrap_or_else(Error::io("read", location)))? == 0;
            let part = if ended { Part::End } else { Part::Content(chunk) };
            if self.parts.send(Ok(part)).is_err() {
                return Ok(false);
            }
            if ended {
                return Ok(true);
            }
        }
    }
}

/// Takes the objects that [`Ahead`] has decompressed.
pub(super) struct Arriving {
    parts: Receiver<Result<Part>>,
    used: SyncSender<Vec<u8>>,
}

impl Arriving {
    fn part(&self) -> Result<Part> {
        self.parts
            .recv()
            .unwrap_or_else(|_| Err(Error::Bug { what: "decompressing ended before the objects did".into() }))
    }

    /// The next object. The one before must have been read to its end.
    pub(super) fn next(&mut self) -> Result<Decompressed<'_>> {
        match self.part()? {
            Part::Begin(meta) => Ok(Decompressed { from: self, meta, current: Vec::new(), at: 0, ended: false }),
            Part::Content(_) | Part::End => Err(Error::Bug { what: "an object was not read to its end".into() }),
        }
    }
}

/// The content of one object.
pub(super) struct Decompressed<'a> {
    from: &'a Arriving,
    meta: Option<Box<ObjectMeta>>,
    current: Vec<u8>,
    at: usize,
    ended: bool,
}

impl Decompressed<'_> {
    /// Its leading metadata.
    pub(super) fn meta(&self) -> Option<&ObjectMeta> {
        self.meta.as_deref()
    }
}

impl Read for Decompressed<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let length = self.fill_buf()?.read(buf)?;
        self.consume(length);
        Ok(length)
    }
}

impl BufRead for Decompressed<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at >= self.current.len() && !self.ended {
            let mut used = std::mem::take(&mut self.current);
            used.clear();
            let _ = self.from.used.try_send(used);
            self.at = 0;
            match self.from.part().map_err(io::Error::other)? {
                Part::Content(chunk) => self.current = chunk,
                Part::End => self.ended = true,
                Part::Begin(_) => return Err(io::Error::other(Error::Bug { what: "an object has no end".into() })),
            }
        }
        Ok(self.current.get(self.at..).unwrap_or_default())
    }

    fn consume(&mut self, amount: usize) {
        self.at += amount;
    }
}
