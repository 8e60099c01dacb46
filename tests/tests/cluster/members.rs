//! Three members that run, each under its sidecar's care.

use super::*;

/// Three pods that run.
pub struct Cluster {
    pub pods: Vec<Pod>,
    pub serving: Vec<Running>,
    pub launched: Vec<Option<Launched>>,
}

impl Cluster {
    pub async fn start(dir: &std::path::Path, minor: &str, store: Option<&Store>) -> Result<Self> {
        Self::of(Pod::cluster(dir, minor, &["a", "b", "c"], store)?).await
    }

    /// Each on a host of its own, with certificates everywhere: of clients, of peers, of the API.
    pub async fn on_hosts(dir: &std::path::Path, network: &Network, store: &Store) -> Result<Self> {
        let mut pods = Pod::on_hosts(dir, "3.6", network, Some(store))?;
        let hosts: Vec<_> = (0..3).map(|host| network.address(host)).collect();
        let names: Vec<_> = hosts.iter().map(String::as_str).collect();
        Pod::secure(&mut pods, &dir.join("certificates"), &names)?;
        Self::of(pods).await
    }

    pub async fn of(mut pods: Vec<Pod>) -> Result<Self> {
        for pod in &mut pods {
            pod.more += "snapshots:\n  deltaPeriod: 1s\n";
        }
        let serving = try_join_all(pods.iter().map(Pod::start_serve)).await?;
        let mut cluster = Self { pods, serving, launched: vec![None, None, None] };
        cluster.launch_all().await?;
        Ok(cluster)
    }

    pub async fn launch_all(&mut self) -> Result<()> {
        for (launched, pod) in self.launched.iter_mut().zip(&self.pods) {
            *launched = Some(pod.start_launch()?);
        }
        self.settled().await
    }

    pub fn log(&self, member: usize) -> String {
        self.launched[member].as_ref().map(Launched::log).unwrap_or_default()
    }

    pub fn logs(&self) -> String {
        (0..3).map(|member| self.log(member)).collect::<Vec<_>>().join("\n----\n")
    }

    /// How many members were started with that.
    pub fn acted(&self, action: &str) -> usize {
        (0..3).filter(|&member| self.log(member).contains(&format!("action={action}"))).count()
    }

    /// Waits until every member votes and serves.
    pub async fn settled(&self) -> Result<()> {
        let settled = || async {
            for pod in &self.pods {
                let mut client = pod.etcd().await?;
                let listed = client.member_list().await?;
                let voters =
                    listed.members().iter().filter(|member| !member.is_learner() && !member.client_urls().is_empty());
                ensure!(voters.count() == 3 && listed.members().len() == 3, "{listed:?}");
            }
            Ok(())
        };
        eventually(LONG, settled).await.with_context(|| self.logs())
    }

    pub fn serve_logs(&self) -> String {
        self.serving.iter().map(Running::log).collect::<Vec<_>>().join("\n----\n")
    }

    pub async fn client(&self, member: usize) -> Result<Client> {
        self.pods[member].etcd().await
    }

    pub async fn stop(&mut self, member: usize) -> Result<()> {
        self.launched[member].take().context("it does not run")?.terminate().await?.expect(STOPPED)?;
        Ok(())
    }

    pub async fn stop_all(&mut self) -> Result<()> {
        let running: Vec<_> = self.launched.iter_mut().filter_map(Option::take).collect();
        for ended in join_all(running.into_iter().map(Launched::terminate)).await {
            ended?.expect(STOPPED)?;
        }
        Ok(())
    }

    /// `kill -9` of a member and its sidecar, and its disk is gone.
    pub async fn lose(&mut self, member: usize) -> Result<()> {
        self.serving.remove(member).kill9().await?;
        self.launched[member].take().context("it does not run")?.kill_etcd().await?;
        self.wipe(member)
    }

    pub fn wipe(&self, member: usize) -> Result<()> {
        Ok(std::fs::remove_dir_all(self.pods[member].member.data_dir.join("member"))?)
    }

    pub fn start_one(&mut self, member: usize) -> Result<()> {
        self.launched[member] = Some(self.pods[member].start_launch()?);
        Ok(())
    }

    /// Starts a member, which gets what the others have from them.
    pub async fn joins(&mut self, member: usize, has: &state::State) -> Result<()> {
        self.start_one(member)?;
        self.settled().await?;
        ensure!(self.log(member).contains("action=Join"), "{}", self.log(member));
        state::same(has, &state::read(&mut self.client(member).await?).await?)
    }

    pub async fn role(&self, member: usize) -> Result<api::Role> {
        Ok(self.pods[member].status().await?.role())
    }

    pub async fn leader(&self) -> Result<usize> {
        eventually(LONG, || async {
            for member in 0..3 {
                if self.role(member).await? == api::Role::Leader {
                    return Ok(member);
                }
            }
            anyhow::bail!("nobody leads")
        })
        .await
    }

    /// Has the leader's sidecar back everything up.
    pub async fn back_up(&self) -> Result<()> {
        let take = || async { self.pods[self.leader().await?].take(api::Kind::Delta, "").await.map(drop) };
        eventually(LONG, take).await
    }
}
