//! Members on hosts of their own, with certificates everywhere, and the network between them.

use tests::network::STORE;

use super::*;

/// Leadership moves while somebody writes, between hosts of their own: the chain stays whole, and has every write that was
/// acknowledged.
#[test]
fn leadership_moves_and_nothing_is_lost() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let network = Network::new(3)?;
    network.run(async || leadership_moves(dir.path(), &network).await)
}

async fn leadership_moves(dir: &std::path::Path, network: &Network) -> Result<()> {
    let minio = Minio::start_at(&dir.join("minio"), "backups", &STORE.to_string()).await?;
    let store = minio.store("backups/c");
    let mut cluster = Cluster::on_hosts(dir, network, &store).await?;
    let urls: Vec<_> = cluster.pods.iter().map(|pod| pod.member.client_url()).collect();
    let options = cluster.pods[0].member.connect_options()?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let writing = tokio::spawn(async move {
        let mut client = Client::connect(urls, Some(options)).await?;
        let mut written = 0;
        while !*stopped.borrow() {
            let put = client.put(format!("moving/{written:06}"), vec![b'x'; 200], None);
            // What was not acknowledged may be there or not.
            if tokio::time::timeout(Duration::from_secs(5), put).await.is_ok_and(|put| put.is_ok()) {
                written += 1;
            }
        }
        anyhow::Ok(written)
    });
    for round in 0..10 {
        let moved = || async {
            let leader = cluster.leader().await?;
            if round % 2 == 1 {
                // Without a word to its sidecar.
                let mut client = cluster.client(leader).await?;
                let own = client.status().await?.leader();
                let others = client.member_list().await?;
                let other = others.members().iter().map(etcd_client::Member::id).find(|id| *id != own);
                client.move_leader(other.context("no other")?).await?;
            } else {
                let prepared = cluster.pods[leader].ctl(["prepare-shutdown"]).run().await?.expect(0)?.json()?;
                ensure!(prepared["leaderId"].as_str().is_some_and(|id| !id.is_empty()), "{prepared}");
            }
            Ok(leader)
        };
        let leader = eventually(LONG, moved).await?;
        eventually(LONG, || async {
            ensure!(cluster.leader().await? != leader, "{leader} leads still");
            Ok(())
        })
        .await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    stop.send(true)?;
    let written: usize = writing.await??;
    cluster.back_up().await?;
    let before = state::read(&mut cluster.client(0).await?).await?;
    store.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    let listed = store.list().await?;
    ensure!(listed["timelines"].as_array().is_some_and(|timelines| timelines.len() == 1), "{listed}");
    cluster.stop_all().await?;
    (0..3).try_for_each(|member| cluster.wipe(member))?;
    cluster.launch_all().await?;
    let mut client = cluster.client(1).await?;
    let options = etcd_client::GetOptions::new().with_prefix().with_count_only();
    let kept = client.get("moving/", Some(options)).await?.count();
    ensure!(usize::try_from(kept)? >= written && written > 100, "{kept} of {written}");
    state::same(&before, &state::read(&mut client).await?)
}

/// Hosts of their own: a leader that is cut off from the store loses nothing, and one that is cut off from its peers gives way.
#[test]
fn cut_off_from_the_store_and_from_its_peers() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let network = Network::new(3)?;
    network.run(async || cut_off(dir.path(), &network).await)
}

async fn cut_off(dir: &std::path::Path, network: &Network) -> Result<()> {
    let minio = Minio::start_at(&dir.join("minio"), "backups", &STORE.to_string()).await?;
    let store = minio.store("backups/c");
    let mut cluster = Cluster::on_hosts(dir, network, &store).await?;
    write(&mut cluster.client(0).await?, 1).await?;
    cluster.back_up().await?;
    let first = cluster.leader().await?;
    // Any member takes the predecessor's call: the leader's sidecar does what it asks for.
    for host in 0..3 {
        // The one that is due each second may be the first to have it.
        let taken = || async {
            cluster.client(host).await?.put("asked", host.to_string(), None).await?;
            let pod = &cluster.pods[host];
            let answer = pod.http()?.get(format!("{}/snapshot/delta", pod.url())).send().await?;
            let (code, text) = (answer.status(), answer.text().await?);
            ensure!(code == 200 && text.contains("\"kind\":\"Incr\""), "{host} of leader {first}: {code} {text}");
            Ok(())
        };
        eventually(LONG, taken).await?;
    }

    // Unless that one is not there.
    let first = cluster.leader().await?;
    cluster.serving.remove(first).kill9().await?;
    let pod = &cluster.pods[(first + 1) % 3];
    let answer = pod.http()?.get(format!("{}/snapshot/full", pod.url())).send().await?;
    let (code, text) = (answer.status(), answer.text().await?);
    ensure!(code == 405 && text.contains("the leader's sidecar"), "{code} {text}");
    cluster.serving.insert(first, cluster.pods[first].start_serve().await?);
    cluster.back_up().await?;

    // From the store: it goes on to lead, and what is written meanwhile comes home afterwards.
    let first = cluster.leader().await?;
    network.cut(first, &STORE.to_string())?;
    let mut client = cluster.client(first).await?;
    let until = tokio::time::Instant::now() + Duration::from_secs(20);
    let mut written = 0;
    while tokio::time::Instant::now() < until {
        client.put(format!("cut/{written}"), vec![b'x'; 1000], None).await?;
        written += 1;
    }
    ensure!(cluster.role(first).await? == api::Role::Leader, "{}", cluster.serve_logs());
    network.mend(first, &STORE.to_string())?;
    cluster.back_up().await.with_context(|| cluster.serve_logs())?;
    let here = Member::single("3.6", &dir.join("here"))?;
    let before = state::read(&mut client).await?;
    state::same(&before, &store.restore_and_read(&here).await?)?;

    // From its peers, while it reaches the store: the others elect another, whose sidecar goes on.
    for other in (0..3).filter(|other| *other != first) {
        network.cut(first, &network.address(other))?;
    }
    let gives_way = || async {
        ensure!(cluster.role(first).await? != api::Role::Leader, "{first} leads still");
        Ok(())
    };
    eventually(LONG, gives_way).await?;
    let second = cluster.leader().await?;
    ensure!(second != first);
    write(&mut cluster.client(second).await?, 2).await?;
    cluster.back_up().await.with_context(|| cluster.serve_logs())?;
    for other in (0..3).filter(|other| *other != first) {
        network.mend(first, &network.address(other))?;
    }
    cluster.settled().await?;
    write(&mut cluster.client(first).await?, 3).await?;
    cluster.back_up().await?;
    let before = state::read(&mut cluster.client(first).await?).await?;
    state::same(&before, &store.restore_and_read(&here).await?)?;
    store.command("verify").args(["--level", "replay"]).run().await?.expect(0)?;
    let listed = store.list().await?;
    ensure!(listed["timelines"].as_array().is_some_and(|timelines| timelines.len() == 1), "{listed}");

    // A member that dies together with its sidecar and its disk comes back over the network, whichever it is.
    for host in 0..3 {
        cluster.lose(host).await?;
        cluster.serving.insert(host, cluster.pods[host].start_serve().await?);
        cluster.start_one(host)?;
        cluster.settled().await?;
        ensure!(cluster.log(host).contains("comes back to its cluster as a learner"), "{}", cluster.log(host));
    }
    // And so do all at once.
    write(&mut cluster.client(first).await?, 4).await?;
    cluster.back_up().await?;
    let before = state::read(&mut cluster.client(first).await?).await?;
    for host in (0..3).rev() {
        cluster.lose(host).await?;
    }
    cluster.serving = try_join_all(cluster.pods.iter().map(Pod::start_serve)).await?;
    cluster.launch_all().await?;
    let restored = cluster.acted("Restore");
    ensure!(restored == 1, "restored {restored} times: {}", cluster.serve_logs());
    for host in 0..3 {
        state::same(&before, &state::read(&mut cluster.client(host).await?).await?)?;
    }
    cluster.stop_all().await?;
    for serving in cluster.serving.drain(..) {
        serving.terminate().await?.expect(0)?;
    }
    Ok(())
}
