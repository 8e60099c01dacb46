// Command gardener writes and reads etcd backups in the format of
// gardener/etcd-backup-restore (EBR), including EBR's limits and its
// weaknesses, so that another reader and writer can be checked against it.
package main

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"compress/lzw"
	"compress/zlib"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
)

const (
	version = "gardener 1"

	probeTimeout   = 5 * time.Second
	commandTimeout = 5 * time.Minute

	kindFull    = "Full"
	kindDelta   = "Incr"
	finalSuffix = ".final"

	// etcd appends the hash to a database of whole 512-byte sectors, so the
	// size of a stream shows whether the hash is there.
	sectorSize = 512

	// The limits of a replay: the first is an option of the etcd that EBR
	// starts, the second is what its etcd client sends at most.
	maxTxnOps       = 10240
	maxRequestBytes = 2 << 20
)

func main() {
	commands := map[string]func([]string) (any, error){
		"full":   full,
		"delta":  delta,
		"list":   list,
		"base":   base,
		"replay": replay,
	}
	if len(os.Args) < 2 {
		fail(errors.New("usage: gardener full|delta|list|base|replay [flags]"))
	}
	if os.Args[1] == "--version" {
		fmt.Println(version)
		return
	}
	command, ok := commands[os.Args[1]]
	if !ok {
		fail(fmt.Errorf("unknown command %q", os.Args[1]))
	}
	result, err := command(os.Args[2:])
	if err != nil {
		fail(fmt.Errorf("%s: %w", os.Args[1], err))
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "gardener:", err)
	os.Exit(1)
}

// parseFlags returns the names of the flags that were given.
func parseFlags(flags *flag.FlagSet, args []string, required ...string) (map[string]bool, error) {
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if flags.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	given := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for _, name := range required {
		if !given[name] {
			return nil, fmt.Errorf("--%s is required", name)
		}
	}
	return given, nil
}

// ---- Snapshots: names, order and selection ----

// snapshot has the fields and keys of EBR's snapshot JSON; the misspelt key is
// EBR's, too.
type snapshot struct {
	CreatedOn              time.Time `json:"createdOn"`
	ImmutabilityExpiryTime time.Time `json:"immutabilityExpriyTime"`
	VersionID              *string   `json:"versionID"`
	Kind                   string    `json:"kind"`
	SnapDir                string    `json:"snapDir"`
	SnapName               string    `json:"snapName"`
	Prefix                 string    `json:"prefix"`
	CompressionSuffix      string    `json:"compressionSuffix"`
	StartRevision          int64     `json:"startRevision"`
	LastRevision           int64     `json:"lastRevision"`
	IsChunk                bool      `json:"isChunk"`
	IsFinal                bool      `json:"isFinal"`
}

func (s *snapshot) name() string {
	name := fmt.Sprintf("%s-%08d-%08d-%d%s", s.Kind, s.StartRevision, s.LastRevision, s.CreatedOn.Unix(), s.CompressionSuffix)
	if s.IsFinal {
		name += finalSuffix
	}
	return name
}

func (s *snapshot) path(store string) string {
	return filepath.Join(store, s.Prefix, s.SnapDir, s.SnapName)
}

// parse reads the key of an object as EBR does: leniently, and with "v1/" in
// any part of the key taking precedence over "v2/".
func parse(key string) (*snapshot, error) {
	isV1 := true
	at := strings.LastIndex(key, "v1/")
	if at < 0 {
		isV1 = false
		if at = strings.LastIndex(key, "v2/"); at < 0 {
			return nil, errors.New("neither v1/ nor v2/ in the key")
		}
	}
	at += len("v1/")

	s := &snapshot{Prefix: key[:at]}
	parts := strings.Split(key[at:], "/")
	if len(parts) > 3 {
		return nil, errors.New("too many levels")
	}
	if isV1 {
		s.IsChunk = len(parts) == 3
		s.SnapDir, parts = parts[0], parts[1:]
	} else {
		s.IsChunk = len(parts) == 2
	}
	s.SnapName = strings.Join(parts, "/")

	tokens := strings.Split(s.SnapName, "-")
	if len(tokens) != 4 {
		return nil, errors.New("not four tokens")
	}
	s.Kind = tokens[0]
	if s.Kind != kindFull && s.Kind != kindDelta {
		return nil, fmt.Errorf("unknown kind %q", s.Kind)
	}
	var err error
	if s.StartRevision, err = strconv.ParseInt(tokens[1], 10, 64); err != nil {
		return nil, err
	}
	if s.LastRevision, err = strconv.ParseInt(tokens[2], 10, 64); err != nil {
		return nil, err
	}
	if s.StartRevision > s.LastRevision {
		return nil, errors.New("start is after last")
	}

	// A chunk has its number behind a slash.
	tail, _, _ := strings.Cut(tokens[3], "/")
	words := strings.Split(tail, ".")
	unix, err := strconv.ParseInt(words[0], 10, 64)
	if err != nil {
		return nil, err
	}
	s.CreatedOn = time.Unix(unix, 0).UTC()
	if len(words) > 1 {
		if suffix := "." + words[1]; suffix != finalSuffix {
			s.CompressionSuffix = suffix
		}
		s.IsFinal = "."+words[len(words)-1] == finalSuffix
	}
	return s, nil
}

// compare orders by last revision; of equal ones the later created is the
// later. EBR's third criterion is about chunks, which selection leaves out.
func compare(a, b *snapshot) int {
	return cmp.Or(cmp.Compare(a.LastRevision, b.LastRevision), a.CreatedOn.Compare(b.CreatedOn))
}

type set struct {
	Full   *snapshot   `json:"fullSnapshot"`
	Deltas []*snapshot `json:"deltaSnapshots"`
}

// latest selects what EBR restores: the last full snapshot and every delta
// behind it. As in EBR, nobody looks for gaps or overlaps.
func latest(store string) (*set, error) {
	var all []*snapshot
	err := filepath.WalkDir(store, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		// Keys are relative to the store. Otherwise a directory of the machine
		// that happens to end in "v1" would change how they are parsed.
		key, err := filepath.Rel(store, path)
		if err != nil {
			return err
		}
		s, err := parse(key)
		if err != nil {
			fmt.Fprintf(os.Stderr, "gardener: skipping %s: %v\n", key, err)
			return nil
		}
		if !s.IsChunk {
			all = append(all, s)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}

	slices.SortStableFunc(all, compare)
	found := &set{}
	for _, s := range slices.Backward(all) {
		if s.Kind == kindFull {
			found.Full = s
			break
		}
		found.Deltas = append(found.Deltas, s)
	}
	slices.SortStableFunc(found.Deltas, compare)
	return found, nil
}

// latestWithFull is for the commands that restore, which is only possible from
// a full snapshot.
func latestWithFull(store string) (*set, error) {
	found, err := latest(store)
	if err == nil && found.Full == nil {
		err = errors.New("no full snapshot in the store")
	}
	return found, err
}

// ---- Contents: compression and hash ----

type codec struct {
	name, suffix string
	writer       func(io.Writer) io.WriteCloser
	reader       func(io.Reader) (io.Reader, error)
}

var codecs = []codec{
	{
		"none", "",
		func(w io.Writer) io.WriteCloser { return nopCloser{w} },
		func(r io.Reader) (io.Reader, error) { return r, nil },
	},
	{
		"gzip", ".gz",
		func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) },
		func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
	},
	{
		"zlib", ".zlib",
		func(w io.Writer) io.WriteCloser { return zlib.NewWriter(w) },
		func(r io.Reader) (io.Reader, error) { return zlib.NewReader(r) },
	},
	{
		"lzw", ".Z",
		func(w io.Writer) io.WriteCloser { return lzw.NewWriter(w, lzw.LSB, 8) },
		func(r io.Reader) (io.Reader, error) { return lzw.NewReader(r, lzw.LSB, 8), nil },
	},
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func findCodec(what string, matches func(codec) bool) (codec, error) {
	i := slices.IndexFunc(codecs, matches)
	if i < 0 {
		return codec{}, fmt.Errorf("unknown compression %q", what)
	}
	return codecs[i], nil
}

// splitHash verifies the sha256 at the end of the contents and returns what is
// before it.
func splitHash(contents []byte) ([]byte, error) {
	if len(contents) <= sha256.Size {
		return nil, errors.New("no sha256 at the end")
	}
	data, want := contents[:len(contents)-sha256.Size], contents[len(contents)-sha256.Size:]
	if got := sha256.Sum256(data); !bytes.Equal(got[:], want) {
		return nil, fmt.Errorf("sha256 is %x, but its record says %x", got, want)
	}
	return data, nil
}

func splitDatabase(contents []byte) ([]byte, error) {
	if len(contents)%sectorSize != sha256.Size {
		return nil, fmt.Errorf("a size of %d bytes is not that of a database with its sha256", len(contents))
	}
	return splitHash(contents)
}

// read returns the decompressed contents of a stored snapshot.
func read(store string, s *snapshot) ([]byte, error) {
	codec, err := findCodec(s.CompressionSuffix, func(c codec) bool { return c.suffix == s.CompressionSuffix })
	if err != nil {
		return nil, err
	}
	file, err := os.Open(s.path(store))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	reader, err := codec.reader(file)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(reader)
}

// target holds the flags of the commands that write a snapshot.
type target struct {
	store, tree, codec, suffix string
	unix                       int64
	dropHash                   bool
	overridesSuffix            bool
}

func (t *target) register(flags *flag.FlagSet) {
	flags.StringVar(&t.store, "store", "", "`directory` that is the prefix of the store")
	flags.StringVar(&t.tree, "tree", "v2", "layout of the store: v1 or v2")
	flags.StringVar(&t.codec, "codec", "none", "compression: none, gzip, zlib or lzw")
	flags.StringVar(&t.suffix, "suffix", "", "`suffix` in the name instead of the one of the codec")
	flags.Int64Var(&t.unix, "unix", time.Now().Unix(), "creation time in `seconds` since the epoch")
	flags.BoolVar(&t.dropHash, "drop-hash", false, "omit the sha256 at the end of the contents")
}

// write completes the snapshot and stores it; directory is only used by v1.
func (t *target) write(s *snapshot, directory int64, contents []byte) (*snapshot, error) {
	codec, err := findCodec(t.codec, func(c codec) bool { return c.name == t.codec })
	if err != nil {
		return nil, err
	}
	switch t.tree {
	case "v1":
		s.SnapDir = fmt.Sprintf("Backup-%d", directory)
	case "v2":
	default:
		return nil, fmt.Errorf("unknown tree %q", t.tree)
	}
	s.Prefix = t.tree + "/"
	s.CreatedOn = time.Unix(t.unix, 0).UTC()
	s.CompressionSuffix = codec.suffix
	if t.overridesSuffix {
		s.CompressionSuffix = t.suffix
	}
	s.SnapName = s.name()

	var compressed bytes.Buffer
	writer := codec.writer(&compressed)
	if _, err := writer.Write(contents); err != nil {
		return nil, err
	}
	if err := writer.Close(); err != nil {
		return nil, err
	}
	path := s.path(t.store)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	return s, os.WriteFile(path, compressed.Bytes(), 0o600)
}

// ---- etcd ----

// connect fails soon when etcd is not there; a plain request would wait.
func connect(ctx context.Context, endpoint string) (*clientv3.Client, error) {
	client, err := clientv3.New(clientv3.Config{
		Endpoints:          []string{endpoint},
		MaxCallSendMsgSize: maxRequestBytes,
		Logger:             zap.NewNop(),
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	if _, err := client.Status(ctx, endpoint); err != nil {
		client.Close()
		return nil, fmt.Errorf("%s: %w", endpoint, err)
	}
	return client, nil
}

// currentRevision asks for a key that need not exist: only the header counts.
func currentRevision(ctx context.Context, client *clientv3.Client) (int64, error) {
	response, err := client.Get(ctx, "foo")
	if err != nil {
		return 0, err
	}
	return response.Header.Revision, nil
}

// event is the element of the array in a delta snapshot.
type event struct {
	EtcdEvent *clientv3.Event `json:"etcdEvent"`
	Time      time.Time       `json:"time"`
}

// ---- Commands ----

func full(args []string) (any, error) {
	var t target
	flags := flag.NewFlagSet("full", flag.ContinueOnError)
	t.register(flags)
	endpoint := flags.String("endpoint", "", "`URL` of etcd")
	final := flags.Bool("final", false, "mark the snapshot as final")
	nameRevision := flags.Int64("name-revision", 0, "`revision` in the name instead of etcd's")
	cut := flags.Int("cut", 0, "`bytes` to drop from the end of the contents")
	given, err := parseFlags(flags, args, "endpoint", "store")
	if err != nil {
		return nil, err
	}
	t.overridesSuffix = given["suffix"]

	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	client, err := connect(ctx, *endpoint)
	if err != nil {
		return nil, err
	}
	defer client.Close()

	// EBR learns the revision before it takes the snapshot, which may hence
	// contain later ones.
	revision, err := currentRevision(ctx, client)
	if err != nil {
		return nil, err
	}
	if given["name-revision"] {
		revision = *nameRevision
	}
	stream, err := client.Snapshot(ctx)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	contents, err := io.ReadAll(stream)
	if err != nil {
		return nil, err
	}
	database, err := splitDatabase(contents)
	if err != nil {
		return nil, err
	}
	if t.dropHash {
		contents = database
	}
	if *cut < 0 || *cut > len(contents) {
		return nil, fmt.Errorf("cannot cut %d of %d bytes", *cut, len(contents))
	}
	contents = contents[:len(contents)-*cut]
	return t.write(&snapshot{Kind: kindFull, LastRevision: revision, IsFinal: *final}, t.unix, contents)
}

func delta(args []string) (any, error) {
	var t target
	flags := flag.NewFlagSet("delta", flag.ContinueOnError)
	t.register(flags)
	endpoint := flags.String("endpoint", "", "`URL` of etcd")
	from := flags.Int64("from", 0, "first `revision`")
	to := flags.Int64("to", 0, "last `revision`")
	directory := flags.Int64("dir", 0, "with --tree v1: `seconds` in the name of the Backup directory")
	given, err := parseFlags(flags, args, "endpoint", "store", "from", "to")
	if err != nil {
		return nil, err
	}
	t.overridesSuffix = given["suffix"]
	if *from < 1 || *from > *to {
		return nil, errors.New("--from must be at least 1 and at most --to")
	}
	if t.tree == "v1" && !given["dir"] {
		return nil, errors.New("--tree v1 requires --dir")
	}

	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	client, err := connect(ctx, *endpoint)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	contents, err := collect(ctx, client, *from, *to)
	if err != nil {
		return nil, err
	}
	if !t.dropHash {
		sum := sha256.Sum256(contents)
		contents = append(contents, sum[:]...)
	}
	return t.write(&snapshot{Kind: kindDelta, StartRevision: *from, LastRevision: *to}, *directory, contents)
}

// collect returns the JSON array of all events of the revisions. The events of
// one revision always arrive in one response of the watch.
func collect(ctx context.Context, client *clientv3.Client, from, to int64) ([]byte, error) {
	var array []byte
	var last int64
	separator := byte('[')
	for response := range client.Watch(ctx, "", clientv3.WithPrefix(), clientv3.WithRev(from)) {
		if err := response.Err(); err != nil {
			return nil, err
		}
		for _, e := range response.Events {
			if e.Kv.ModRevision > to {
				break
			}
			object, err := json.Marshal(event{EtcdEvent: e, Time: time.Now()})
			if err != nil {
				return nil, err
			}
			array = append(append(array, separator), object...)
			separator = ','
			last = e.Kv.ModRevision
		}
		if n := len(response.Events); n > 0 && response.Events[n-1].Kv.ModRevision >= to {
			// EBR names a delta after its last event.
			if last != to {
				return nil, fmt.Errorf("no event has revision %d", to)
			}
			return append(array, ']'), nil
		}
	}
	return nil, fmt.Errorf("the watch ended before revision %d", to)
}

func list(args []string) (any, error) {
	flags := flag.NewFlagSet("list", flag.ContinueOnError)
	store := flags.String("store", "", "`directory` that is the prefix of the store")
	if _, err := parseFlags(flags, args, "store"); err != nil {
		return nil, err
	}
	return latest(*store)
}

func base(args []string) (any, error) {
	flags := flag.NewFlagSet("base", flag.ContinueOnError)
	store := flags.String("store", "", "`directory` that is the prefix of the store")
	out := flags.String("out", "", "`file` to write the database with its sha256 to")
	if _, err := parseFlags(flags, args, "store", "out"); err != nil {
		return nil, err
	}
	found, err := latestWithFull(*store)
	if err != nil {
		return nil, err
	}
	contents, err := read(*store, found.Full)
	if err == nil {
		_, err = splitDatabase(contents)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", found.Full.SnapName, err)
	}
	return found.Full, os.WriteFile(*out, contents, 0o600)
}

func replay(args []string) (any, error) {
	flags := flag.NewFlagSet("replay", flag.ContinueOnError)
	store := flags.String("store", "", "`directory` that is the prefix of the store")
	endpoint := flags.String("endpoint", "", "`URL` of the etcd that was started from the base")
	if _, err := parseFlags(flags, args, "store", "endpoint"); err != nil {
		return nil, err
	}
	found, err := latestWithFull(*store)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandTimeout)
	defer cancel()
	client, err := connect(ctx, *endpoint)
	if err != nil {
		return nil, err
	}
	defer client.Close()

	for i, s := range found.Deltas {
		if err := replayDelta(ctx, client, *store, s, i == 0); err != nil {
			return nil, fmt.Errorf("%s: %w", s.SnapName, err)
		}
	}
	revision, err := currentRevision(ctx, client)
	return map[string]int64{"revision": revision}, err
}

func replayDelta(ctx context.Context, client *clientv3.Client, store string, s *snapshot, isFirst bool) error {
	events, err := readEvents(store, s)
	if err != nil {
		return err
	}
	if isFirst {
		if events, err = withoutKnown(ctx, client, s, events); err != nil {
			return err
		}
	}
	if err := apply(ctx, client, events); err != nil {
		return err
	}
	revision, err := currentRevision(ctx, client)
	if err != nil {
		return err
	}
	if revision != s.LastRevision {
		return fmt.Errorf("etcd is at revision %d instead of %d", revision, s.LastRevision)
	}
	return nil
}

func readEvents(store string, s *snapshot) ([]event, error) {
	contents, err := read(store, s)
	if err != nil {
		return nil, err
	}
	data, err := splitHash(contents)
	if err != nil {
		return nil, err
	}
	var events []event
	if err := json.Unmarshal(data, &events); err != nil {
		return nil, err
	}
	// EBR crashes on such an element.
	for i, e := range events {
		if e.EtcdEvent == nil || e.EtcdEvent.Kv == nil {
			return nil, fmt.Errorf("element %d has no key-value", i)
		}
	}
	return events, nil
}

// withoutKnown leaves out the events that the base already has. When it has
// more than the whole delta, EBR finds no start and keeps every event, which
// lets the check of the revision fail.
func withoutKnown(ctx context.Context, client *clientv3.Client, s *snapshot, events []event) ([]event, error) {
	response, err := client.Get(ctx, "", clientv3.WithLastRev()...)
	if err != nil {
		return nil, err
	}
	revision := response.Header.Revision
	if revision == s.LastRevision {
		return nil, nil
	}
	start := slices.IndexFunc(events, func(e event) bool { return e.EtcdEvent.Kv.ModRevision > revision })
	return events[max(0, start):], nil
}

// apply makes one transaction of the events of each revision, so that etcd
// counts the same revisions again. Leases are not part of a delta, so keys lose
// theirs.
func apply(ctx context.Context, client *clientv3.Client, events []event) error {
	for len(events) > 0 {
		revision := events[0].EtcdEvent.Kv.ModRevision
		end := 1
		for end < len(events) && !startsTxn(events[end-1], events[end]) {
			end++
		}
		if end > maxTxnOps {
			return fmt.Errorf("revision %d has %d operations, more than %d", revision, end, maxTxnOps)
		}
		ops := make([]clientv3.Op, 0, end)
		for _, e := range events[:end] {
			key := string(e.EtcdEvent.Kv.Key)
			switch e.EtcdEvent.Type {
			case clientv3.EventTypePut:
				ops = append(ops, clientv3.OpPut(key, string(e.EtcdEvent.Kv.Value)))
			case clientv3.EventTypeDelete:
				ops = append(ops, clientv3.OpDelete(key))
			default:
				return fmt.Errorf("revision %d has an event of type %d", revision, e.EtcdEvent.Type)
			}
		}
		if _, err := client.Txn(ctx).Then(ops...).Commit(); err != nil {
			return fmt.Errorf("revision %d: %w", revision, err)
		}
		events = events[end:]
	}
	return nil
}

// startsTxn is EBR's condition, which also matters when the order is wrong: only
// a rise separates two transactions.
func startsTxn(previous, next event) bool {
	before, after := previous.EtcdEvent.Kv.ModRevision, next.EtcdEvent.Kv.ModRevision
	return before != 0 && after > before
}
