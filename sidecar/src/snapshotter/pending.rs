//! The delta that fills. Pure.

use std::collections::BTreeSet;

use etcd_client::EventType;
use etcd_client::proto::PbEvent;
use etcd_format::mvcc::KeyValue;

use crate::delta::Builder;
use crate::{Error, Result};

/// A delta that takes in what the watch sends. It is closed only between revisions: a message may end inside of one, and
/// may have more than fits.
#[derive(Debug)]
pub(super) struct Pending {
    builder: Builder,
    /// Whether its last revision is whole.
    whole: bool,
    incoming: Option<Incoming>,
    max_bytes: u64,
}

/// Events of a message that are not in the delta yet.
#[derive(Debug)]
struct Incoming {
    events: std::iter::Peekable<std::vec::IntoIter<PbEvent>>,
    received_unix_ms: i64,
    /// Whether the message's last revision goes on in the next message.
    fragment: bool,
}

impl Pending {
    /// Begins with the revision after `last`; is full at so many bytes of content.
    pub fn after(last: i64, max_bytes: u64) -> Result<Self> {
        Ok(Self { builder: Builder::new(last)?, whole: true, incoming: None, max_bytes })
    }

    /// Last revision in it, or before it when it is empty.
    pub fn last(&self) -> i64 {
        self.builder.last()
    }

    /// Whether everything that was received is elsewhere.
    pub fn is_empty(&self) -> bool {
        self.incoming.is_none() && self.builder.events() == 0
    }

    /// Whether it has changes, and ends with a whole revision.
    pub fn is_closable(&self) -> bool {
        self.whole && self.builder.events() > 0
    }

    /// Leases that its puts refer to.
    pub fn leases(&self) -> &BTreeSet<i64> {
        self.builder.leases()
    }

    /// Whether it has all that it should take.
    pub fn is_full(&self) -> bool {
        self.builder.content_bytes() >= self.max_bytes
    }

    /// Whether events are at hand that it has not taken in.
    pub fn has_more(&self) -> bool {
        self.incoming.is_some()
    }

    /// Whether the next message may come.
    pub fn wants_more(&self) -> bool {
        self.incoming.is_none() && !(self.whole && self.is_full())
    }

    /// Whether everything up to a revision is in it, whole.
    pub fn has(&self, revision: i64) -> bool {
        self.incoming.is_none() && self.whole && self.last() >= revision
    }

    /// Takes a message, when [`Pending::wants_more`].
    pub fn receive(&mut self, events: Vec<PbEvent>, fragment: bool, received_unix_ms: i64) {
        self.incoming = Some(Incoming { events: events.into_iter().peekable(), received_unix_ms, fragment });
    }

    /// Takes in the message at hand, up to its end or until the delta is full, then between two revisions. A revision that
    /// is missing is an error of class [`Missing`](crate::Class::Missing).
    pub fn absorb(&mut self) -> Result<()> {
        let Some(incoming) = &mut self.incoming else { return Ok(()) };
        let fragment = incoming.fragment;
        while let Some(event) = incoming.events.peek() {
            let Some(kv) = &event.kv else { return Err(Error::corrupt("etcd sent an event without a key")) };
            let (main, last) = (kv.mod_revision, self.builder.last());
            if main > last {
                self.whole = true;
                if self.builder.content_bytes() >= self.max_bytes && self.builder.events() > 0 {
                    return Ok(());
                }
                self.builder.revision(main, incoming.received_unix_ms)?;
                self.whole = false;
            } else if main < last || main < self.builder.first() {
                incoming.events.next();
                continue;
            }
            if event.r#type() == EventType::Put {
                self.builder.put(&KeyValue {
                    key: &kv.key,
                    create_revision: kv.create_revision,
                    mod_revision: kv.mod_revision,
                    version: kv.version,
                    value: &kv.value,
                    lease: kv.lease,
                })?;
            } else {
                self.builder.delete(&kv.key)?;
            }
            incoming.events.next();
        }
        self.incoming = None;
        self.whole = !fragment;
        Ok(())
    }

    /// Gives up a revision that has not arrived whole, with what else is at hand of its message.
    pub fn cut_unfinished(&mut self) -> Result<()> {
        if !self.whole {
            self.builder.cut_last_revision()?;
            self.whole = true;
            self.incoming = None;
        }
        Ok(())
    }

    /// Takes the delta, and begins the next one.
    pub fn close(&mut self) -> Result<Builder> {
        let next = Builder::new(self.builder.last())?;
        Ok(std::mem::replace(&mut self.builder, next))
    }
}

#[cfg(test)]
mod tests {
    use etcd_client::proto::{PbEvent, PbKeyValue};

    use super::*;

    fn put(main: i64, bytes: usize) -> PbEvent {
        let kv = PbKeyValue {
            key: b"k".to_vec(),
            create_revision: 1,
            mod_revision: main,
            version: main,
            value: vec![b'v'; bytes],
            lease: 0,
        };
        PbEvent { r#type: 0, kv: Some(kv), prev_kv: None }
    }

    fn puts(revisions: &[i64]) -> Vec<PbEvent> {
        revisions.iter().map(|main| put(*main, 10)).collect()
    }

    fn closed(pending: &mut Pending) -> (i64, i64, u64) {
        let builder = pending.close().unwrap();
        (builder.first(), builder.last(), builder.events())
    }

    #[test]
    fn a_message_is_taken_in_and_what_is_known_is_skipped() {
        let mut pending = Pending::after(4, 1000).unwrap();
        pending.receive(puts(&[3, 4, 5, 5, 6]), false, 1);
        pending.absorb().unwrap();
        assert!(pending.is_closable() && pending.wants_more() && pending.has(6) && !pending.has(7));
        assert_eq!(closed(&mut pending), (5, 6, 3));
        assert!(!pending.is_closable());
    }

    #[test]
    fn a_revision_in_fragments_is_not_closed_before_its_end() {
        let mut pending = Pending::after(4, 20).unwrap();
        pending.receive(puts(&[5, 6, 6]), true, 1);
        pending.absorb().unwrap();
        // The first revision filled it: the rest waits.
        assert!(pending.is_closable() && pending.has_more() && !pending.wants_more());
        assert_eq!(closed(&mut pending), (5, 5, 1));
        pending.absorb().unwrap();
        assert!(!pending.is_closable() && pending.is_full() && pending.wants_more());
        pending.receive(puts(&[6]), false, 1);
        pending.absorb().unwrap();
        assert_eq!(closed(&mut pending), (6, 6, 3));
    }

    #[test]
    fn a_revision_that_did_not_arrive_whole_is_cut() {
        let mut pending = Pending::after(4, 1000).unwrap();
        pending.receive(puts(&[5, 6]), true, 1);
        pending.absorb().unwrap();
        pending.cut_unfinished().unwrap();
        assert_eq!(closed(&mut pending), (5, 5, 1));
        // And one that did is not.
        pending.receive(puts(&[6]), false, 1);
        pending.absorb().unwrap();
        pending.cut_unfinished().unwrap();
        assert_eq!(closed(&mut pending), (6, 6, 1));
    }

    #[test]
    fn a_missing_revision_is_an_error_and_what_came_before_it_stays() {
        let mut pending = Pending::after(4, 1000).unwrap();
        pending.receive(puts(&[5, 7]), false, 1);
        assert_eq!(pending.absorb().unwrap_err().class(), crate::Class::Missing);
        pending.cut_unfinished().unwrap();
        assert_eq!(closed(&mut pending), (5, 5, 1));
    }
}
