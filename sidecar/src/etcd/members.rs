//! Membership of a cluster, asked of one of its members.

use etcd_client::MemberAddOptions;

use super::{Etcd, deadline};
use crate::Result;

/// A member, as its cluster lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its id.
    pub id: u64,
    /// Its name; empty until one that was added has started.
    pub name: String,
    /// Where its peers reach it.
    pub peer_urls: Vec<String>,
    /// Where clients reach it; empty until it has started.
    pub client_urls: Vec<String>,
    /// Whether it does not vote yet.
    pub is_learner: bool,
}

impl Etcd {
    /// The members, as this one knows them: without a quorum it may not know the newest.
    pub async fn members(&mut self) -> Result<Vec<Listed>> {
        let listed = deadline(self.timeout, self.client.member_list()).await.map_err(self.fail("list the members"))?;
        let listed = listed.members().iter().map(|member| Listed {
            id: member.id(),
            name: member.name().to_owned(),
            peer_urls: member.peer_urls().to_vec(),
            client_urls: member.client_urls().to_vec(),
            is_learner: member.is_learner(),
        });
        Ok(listed.collect())
    }

    /// Adds a member that does not vote until it is promoted.
    pub async fn add_learner(&mut self, peer_urls: &[String]) -> Result<()> {
        let options = MemberAddOptions::new().with_is_learner();
        let adding = self.client.member_add(peer_urls, Some(options));
        deadline(self.timeout, adding).await.map_err(self.fail("add a learner")).map(drop)
    }

    /// Takes a member out of the cluster.
    pub async fn remove_member(&mut self, id: u64) -> Result<()> {
        deadline(self.timeout, self.client.member_remove(id)).await.map_err(self.fail("remove a member")).map(drop)
    }

    /// Lets a learner vote. Refused until it has caught up.
    pub async fn promote(&mut self, id: u64) -> Result<()> {
        deadline(self.timeout, self.client.member_promote(id)).await.map_err(self.fail("promote a learner")).map(drop)
    }

    /// Tells the cluster where a member's peers reach it.
    pub async fn update_member(&mut self, id: u64, peer_urls: &[String]) -> Result<()> {
        let updating = self.client.member_update(id, peer_urls);
        deadline(self.timeout, updating).await.map_err(self.fail("update a member's peer URLs")).map(drop)
    }
}
