//! The tables of what is decided.

use super::*;

const OURS: u64 = 7;

fn sound(revision: i64, unapplied: u64) -> Data {
    let (cluster_id, repairs, restored_since, voters, of_another, differs) = (OURS, None, false, 1, None, None);
    Data::Sound(Sound { cluster_id, revision, unapplied, repairs, restored_since, voters, of_another, differs })
}

/// The volume of another member.
fn of_b() -> Data {
    let Data::Sound(sound) = sound(5, 0) else { unreachable!() };
    Data::Sound(Sound { of_another: Some("b".into()), ..sound })
}

fn upto(last: i64) -> Backups {
    Backups::Upto { last, timeline: 1, cluster_id: Some(OURS) }
}

fn unknown() -> Backups {
    Backups::Unknown { why: "no route".into() }
}

fn spoiled() -> Backups {
    Backups::Damaged { why: "timeline.json".into() }
}

fn damaged() -> Data {
    damaged_of(None, 1, false)
}

fn damaged_of(cluster_id: Option<u64>, voters: usize, restored_since: bool) -> Data {
    let (part, evidence) = (Part::Database, "page 7".into());
    Data::Damaged(Damaged { part, evidence, cluster_id, voters, restored_since, only_here: None })
}

/// Data whose hash is not the one recorded, and that has more than the backups.
fn only_here() -> Data {
    let Data::Damaged(damaged) = damaged_of(Some(OURS), 1, false) else { unreachable!() };
    Data::Damaged(Damaged { only_here: Some("it has more".into()), ..damaged })
}

fn alone(data: Data, backups: Backups, may_start_empty: bool) -> Facts {
    let (live, cannot_write) = (Live::Nobody, None);
    Facts { data, backups, replicas: 1, is_existing: false, live, lost: 0, may_start_empty, cannot_write }
}

fn of_three(data: Data, backups: Backups, live: Live, lost: usize) -> Facts {
    Facts { replicas: 3, live, lost, ..alone(data, backups, false) }
}

fn check(facts: &Facts, expected: Decision) {
    let (decision, why) = decide(facts);
    assert_eq!(decision, expected, "{facts:?}: {why}");
    assert!(!why.is_empty());
}

const KEEP: Decision = Decision::Keep;
const LATER: Decision = Decision::Refuse { may_pass: true };
const NEVER: Decision = Decision::Refuse { may_pass: false };

#[test]
fn every_case_of_one_is_decided() {
    let with = |change: fn(&mut Sound)| {
        let Data::Sound(mut sound) = sound(5, 0) else { unreachable!() };
        change(&mut sound);
        Data::Sound(sound)
    };
    let restored = with(|sound| sound.restored_since = true);
    let restored_as_another = with(|sound| (sound.restored_since, sound.cluster_id) = (true, 99));
    let foreign = with(|sound| sound.cluster_id = 99);
    let of_several = with(|sound| sound.voters = 3);
    let unnamed = Backups::Upto { last: 5, timeline: 1, cluster_id: None };
    // Data, backups, may start empty, and what follows.
    let cases = [
        (sound(5, 0), Backups::NotConfigured, false, KEEP),
        (sound(5, 0), Backups::Empty, false, KEEP),
        (sound(5, 0), unknown(), false, KEEP),
        (sound(5, 0), spoiled(), false, NEVER),
        (Data::Absent, spoiled(), true, NEVER),
        (damaged(), spoiled(), true, NEVER),
        (sound(5, 0), upto(5), false, KEEP),
        (sound(5, 3), upto(8), false, KEEP),
        (sound(5, 2), upto(8), false, Decision::Append),
        (sound(5, 0), upto(8), true, Decision::Append),
        (restored, upto(8), false, KEEP),
        (restored_as_another, upto(8), false, KEEP),
        (of_several, upto(8), false, KEEP),
        (foreign.clone(), upto(5), true, NEVER),
        (foreign.clone(), unnamed, false, KEEP),
        (foreign, Backups::Empty, false, KEEP),
        (Data::Absent, Backups::NotConfigured, false, Decision::Bootstrap),
        (Data::Absent, Backups::Empty, false, Decision::Bootstrap),
        (Data::Absent, Backups::Begun, false, Decision::Bootstrap),
        (Data::Absent, unknown(), true, LATER),
        (Data::Absent, upto(5), false, Decision::Restore),
        (damaged(), Backups::NotConfigured, false, NEVER),
        (damaged(), Backups::NotConfigured, true, Decision::Bootstrap),
        (damaged(), Backups::Empty, false, NEVER),
        (damaged(), Backups::Empty, true, Decision::Bootstrap),
        (damaged(), unknown(), true, LATER),
        (damaged(), upto(5), true, Decision::Restore),
        (damaged_of(Some(OURS), 1, false), upto(5), false, Decision::Restore),
        (damaged_of(Some(99), 1, false), upto(5), true, NEVER),
        (damaged_of(Some(99), 1, true), upto(5), false, Decision::Restore),
        (damaged_of(Some(OURS), 3, false), upto(5), true, NEVER),
        (damaged_of(Some(OURS), 3, false), Backups::NotConfigured, true, NEVER),
        (only_here(), upto(5), true, NEVER),
    ];
    for (data, backups, may_start_empty, expected) in cases {
        check(&alone(data, backups, may_start_empty), expected);
    }
}

#[test]
fn every_case_of_several_is_decided() {
    let serves = |us| Live::Serves { cluster_id: OURS, us };
    let (started, foreign) = (serves(Place::Started), Live::Serves { cluster_id: 99, us: Place::Started });
    let (strangers, friends) = (Live::NoQuorum { knows_us: false }, Live::NoQuorum { knows_us: true });
    let (wait, join, bootstrap) = (Decision::Wait, Decision::Join, Decision::Bootstrap);
    // Data, backups, the others, how many lost theirs, and what follows.
    let mut cases = vec![
        (sound(5, 0), upto(8), Live::Nobody, 0, KEEP),
        (sound(5, 0), upto(4), friends, 0, KEEP),
        (sound(5, 0), upto(8), started, 0, KEEP),
        (sound(5, 0), Backups::NotConfigured, started, 0, KEEP),
        (sound(5, 0), unknown(), started, 0, KEEP),
        (sound(5, 0), spoiled(), Live::Nobody, 0, KEEP),
        (Data::Absent, spoiled(), Live::Nobody, 3, NEVER),
        (damaged(), spoiled(), started, 0, join),
        (sound(5, 0), upto(8), foreign, 0, NEVER),
        (sound(5, 0), Backups::Upto { last: 8, timeline: 1, cluster_id: Some(99) }, Live::Nobody, 0, NEVER),
        (sound(5, 0), upto(8), serves(Place::NotListed), 0, join),
        (sound(5, 0), upto(8), serves(Place::Added), 0, join),
        (sound(5, 0), upto(8), serves(Place::Alive), 0, LATER),
        (sound(5, 0), upto(8), serves(Place::Another), 0, NEVER),
        (sound(5, 0), Backups::Begun, Live::Nobody, 0, KEEP),
        (Data::Absent, Backups::Empty, serves(Place::New), 0, bootstrap),
        (Data::Absent, Backups::NotConfigured, serves(Place::New), 0, bootstrap),
        (Data::Absent, unknown(), serves(Place::New), 0, bootstrap),
        (Data::Absent, upto(8), serves(Place::New), 0, join),
        (damaged(), upto(8), serves(Place::New), 0, join),
        (Data::Absent, Backups::Begun, Live::Nobody, 2, wait),
        (Data::Absent, Backups::Begun, Live::Nobody, 3, bootstrap),
        (Data::Absent, Backups::Begun, strangers, 3, bootstrap),
        (Data::Absent, Backups::Begun, strangers, 0, wait),
        (damaged(), Backups::Begun, Live::Nobody, 3, wait),
        (Data::Absent, Backups::Empty, Live::Nobody, 0, bootstrap),
        (Data::Absent, Backups::NotConfigured, strangers, 0, bootstrap),
        (Data::Absent, Backups::NotConfigured, friends, 0, wait),
        (damaged(), Backups::NotConfigured, Live::Nobody, 0, wait),
        (damaged(), Backups::Empty, strangers, 3, wait),
        (only_here(), upto(8), Live::Nobody, 3, wait),
        (only_here(), upto(8), started, 0, join),
    ];
    for (live, expected) in
        [(Live::Nobody, NEVER), (friends, NEVER), (strangers, NEVER), (serves(Place::NotListed), join)]
    {
        cases.push((of_b(), upto(5), live, 0, expected));
        cases.push((of_b(), Backups::NotConfigured, live, 0, expected));
    }
    for lost in [Data::Absent, damaged()] {
        cases.extend([
            (lost.clone(), unknown(), Live::Nobody, 3, LATER),
            (lost.clone(), upto(8), Live::Nobody, 2, wait),
            (lost.clone(), upto(8), Live::Nobody, 3, Decision::Restore),
            (lost.clone(), upto(8), strangers, 3, wait),
            (lost.clone(), upto(8), friends, 3, wait),
            (lost.clone(), upto(8), started, 0, join),
            (lost.clone(), unknown(), started, 0, join),
            (lost.clone(), Backups::NotConfigured, foreign, 0, join),
            (lost.clone(), upto(8), serves(Place::NotListed), 3, join),
            (lost.clone(), upto(8), serves(Place::Added), 0, join),
            (lost, upto(8), serves(Place::Alive), 0, LATER),
        ]);
    }
    for (data, backups, live, lost, expected) in cases {
        check(&of_three(data, backups, live, lost), expected);
    }
}

#[test]
fn a_cluster_that_exists_is_not_begun_again() {
    let facts = of_three(Data::Absent, Backups::NotConfigured, Live::Nobody, 0);
    check(&Facts { is_existing: true, ..facts.clone() }, Decision::Wait);
    check(&facts, Decision::Bootstrap);
    let begun = of_three(Data::Absent, Backups::Begun, Live::Nobody, 3);
    check(&Facts { is_existing: true, ..begun }, Decision::Wait);
    for (backups, expected) in [(Backups::Empty, NEVER), (Backups::NotConfigured, NEVER), (upto(8), Decision::Restore)]
    {
        check(&Facts { is_existing: true, ..alone(Data::Absent, backups, true) }, expected);
    }
    // One member is left in the configuration, and others serve still.
    let live = Live::Serves { cluster_id: OURS, us: Place::Started };
    check(&Facts { live, ..alone(damaged(), upto(8), false) }, Decision::Join);
}

/// Whatever the facts are, some things are never done.
#[test]
fn what_is_never_done_is_never_decided() {
    let serves = |us| [OURS, 99].map(|cluster_id| Live::Serves { cluster_id, us });
    let places = [Place::NotListed, Place::Added, Place::New, Place::Started, Place::Alive, Place::Another];
    let mut lives: Vec<_> = places.into_iter().flat_map(serves).collect();
    lives.extend([Live::Nobody, Live::NoQuorum { knows_us: false }, Live::NoQuorum { knows_us: true }]);
    let of = |cluster_id| Backups::Upto { last: 8, timeline: 1, cluster_id };
    let stores = [
        Backups::NotConfigured,
        Backups::Empty,
        Backups::Begun,
        unknown(),
        spoiled(),
        of(None),
        of(Some(OURS)),
        of(Some(99)),
    ];
    let mut datas = vec![Data::Absent, damaged(), only_here(), sound(5, 0), sound(5, 9), sound(9, 0)];
    for (of_cluster, voters) in [(OURS, 1), (OURS, 3), (99, 1)] {
        datas.extend([false, true].map(|since| damaged_of(Some(of_cluster), voters, since)));
    }
    let mut count = 0;
    for (data, backups) in datas.iter().flat_map(|data| stores.iter().map(move |backups| (data, backups))) {
        for (live, bits) in lives.iter().flat_map(|live| (0..32usize).map(move |bits| (*live, bits))) {
            let (replicas, lost) = if bits & 1 == 0 { (1, 0) } else { (3, bits >> 3) };
            let facts = Facts {
                data: data.clone(),
                backups: backups.clone(),
                replicas,
                is_existing: bits & 2 != 0,
                live,
                lost,
                may_start_empty: bits & 4 != 0,
                cannot_write: None,
            };
            let (decision, why) = decide(&facts);
            count += 1;
            let never = |what: bool, rule: &str| assert!(!what, "{rule}: {facts:?}: {decision:?}: {why}");
            let is_sound = matches!(data, Data::Sound(_));
            let replaces = matches!(decision, Decision::Restore | Decision::Bootstrap);
            let is_served = matches!(live, Live::Serves { .. });
            never(is_sound && replaces, "sound data is never replaced from the store");
            never(!is_sound && matches!(decision, Decision::Keep | Decision::Append), "etcd starts on no damage");
            never(
                matches!(backups, Backups::Unknown { .. } | Backups::Damaged { .. }) && replaces && !is_served,
                "what is not known is not there",
            );
            never(
                matches!(backups, Backups::Upto { .. }) && decision == Decision::Bootstrap && !is_served,
                "nothing begins anew beside backups",
            );
            never(*data == only_here() && replaces && !is_served, "what is nowhere else stays");
            never(is_served && decision == Decision::Restore, "nothing is restored beside a cluster that serves");
            never(replicas > 1 && lost < replicas && decision == Decision::Restore, "who is away may have more");
            never(
                matches!(backups, Backups::NotConfigured | Backups::Empty | Backups::Begun)
                    && matches!(decision, Decision::Restore | Decision::Append),
                "there is nothing to restore",
            );
            let is_foreign = Cause::of(&facts) == Cause::ForeignCluster;
            never(is_foreign && matches!(decision, Decision::Keep | Decision::Append | Decision::Restore), "foreign");
            never(matches!(live, Live::Serves { us: Place::Alive, .. }) && decision == Decision::Join, "it runs");
        }
    }
    assert_eq!(count, datas.len() * stores.len() * lives.len() * 32);
}

#[test]
fn each_thing_that_is_found_has_its_own_name() {
    let with = |change: fn(&mut Sound)| {
        let Data::Sound(mut sound) = sound(5, 0) else { unreachable!() };
        change(&mut sound);
        Data::Sound(sound)
    };
    let serves = |us| Live::Serves { cluster_id: OURS, us };
    let log = Data::Damaged(Damaged {
        part: Part::Log,
        evidence: "missing".into(),
        cluster_id: None,
        voters: 1,
        restored_since: false,
        only_here: None,
    });
    let cases = [
        (Data::Absent, upto(5), Live::Nobody, Cause::NoData),
        (sound(5, 0), upto(5), Live::Nobody, Cause::Sound),
        (with(|sound| sound.repairs = Some("torn".into())), upto(5), Live::Nobody, Cause::Repairable),
        (sound(5, 0), upto(8), Live::Nobody, Cause::Behind),
        (sound(5, 3), upto(8), Live::Nobody, Cause::Sound),
        (with(|sound| sound.restored_since = true), upto(8), Live::Nobody, Cause::Sound),
        (with(|sound| sound.cluster_id = 99), upto(5), Live::Nobody, Cause::ForeignCluster),
        (sound(5, 0), upto(5), Live::Serves { cluster_id: 99, us: Place::Started }, Cause::ForeignCluster),
        (sound(5, 0), upto(5), serves(Place::Another), Cause::AnotherMember),
        (of_b(), upto(5), Live::Nobody, Cause::AnotherMember),
        (sound(5, 0), upto(5), serves(Place::NotListed), Cause::Removed),
        (sound(5, 0), upto(5), serves(Place::Alive), Cause::RunsElsewhere),
        (damaged(), upto(5), Live::Nobody, Cause::Damaged(Part::Database)),
        (damaged_of(Some(99), 1, false), upto(5), Live::Nobody, Cause::ForeignCluster),
        (log, upto(5), Live::Nobody, Cause::Damaged(Part::Log)),
    ];
    for (data, backups, live, expected) in cases {
        let facts = Facts { live, ..alone(data, backups, false) };
        assert_eq!(Cause::of(&facts), expected, "{facts:?}");
    }
}

#[test]
fn rows_that_differ_are_damage_only_beside_backups_of_their_own() {
    let with = |agree: &[bool], restored_since| {
        let Data::Sound(sound) = sound(5, 1) else { unreachable!() };
        let differs = Some(Differs { evidence: "hash".into(), agree: agree.to_vec() });
        Data::Sound(Sound { restored_since, differs, ..sound })
    };
    let decided = |data: Data, last| decide(&alone(data.judged(&upto(last)), upto(last), true)).0;
    let (yes, no) = ([true; 8], [false; 8]);
    assert_eq!(decided(with(&yes, false), 6), Decision::Restore);
    assert_eq!(decided(with(&yes, false), 5), NEVER, "its log may have one more");
    assert_eq!(decided(with(&yes, true), 6), KEEP, "it was restored: other rows are to be expected");
    let one_differs = [&yes[..3], &no[..1], &yes[..4]].concat();
    assert_eq!(decided(with(&one_differs, false), 6), Decision::Restore);
    // Another history, also where it ends with the same by chance.
    for agree in [&no[..], &[&yes[..], &no[..2]].concat(), &[&no[..], &yes[..1]].concat()] {
        assert_eq!(decided(with(agree, false), 6), KEEP, "{agree:?}");
    }
    for agree in [&[][..], &yes[..3], &no[..3], &[&yes[..], &no[..1]].concat()] {
        assert_eq!(decided(with(agree, false), 6), NEVER, "{agree:?}");
    }
    assert_eq!(decided(sound(5, 1), 6), KEEP);
}

#[test]
fn the_reason_has_the_evidence() {
    let facts = Facts { cannot_write: Some("read-only".into()), ..alone(sound(5, 0), upto(5), false) };
    assert!(decide(&facts).1.ends_with("; read-only"));
    let (_, why) = decide(&alone(damaged(), upto(9), false));
    assert!(why.contains("page 7") && why.contains("revision 9"), "{why}");
}
