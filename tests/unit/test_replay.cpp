// SPDX-License-Identifier: GPL-2.0-only OR MIT
// cli/recorder and cli/replay: what was recorded is judged again as it was, in its order and at its times; what a file
// holds leads nobody astray; a recorder outlives what happens to its files.
#include <algorithm>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <sys/resource.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <nlohmann/json.hpp>

#include "cli/passed_over.h"
#include "cli/recorder.h"
#include "cli/replay.h"
#include "folder.h"
#include "sink/history.h"
#include "sink/json.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;

namespace {

RecordingHeader header(const std::string& run, std::uint32_t part = 1, std::int64_t written_ns = 1)
{
    return {.version = "0.1.0",
            .run = run,
            .part = part,
            .written_ns = written_ns,
            .facts = {.host_name = "proxy", .backend = "cgroup", .attach = "", .tells_outcomes = false, .missing = {}},
            .filter = {},
            .connections = true};
}

std::string text_of(const std::vector<RecordingEntry>& entries)
{
    std::string text;
    for (const RecordingEntry& entry : entries)
        text += encode(entry) + "\n";
    return text;
}

/// Makes the records that `finrace run` makes, and keeps them.
class Clerk final : public Listener {
public:
    explicit Clerk(const Feed& feed) : feed_(feed) {}

    void on_event(const event& e) override
    {
        histories_.add(e);
        if (e.kind == EVENT_CLOSED || e.kind == EVENT_OPEN_FAILED)
            keep(connection_record(origin(), e, histories_.take(e.connection.id), name_of(e)));
    }
    void on_verdict(const Judged& judged) override
    {
        const Verdict& verdict = *judged.classification.verdict;
        verdicts.push_back(verdict.cause);
        keep(judged.benched != nullptr
                 ? benched_record(origin(), judged.e, *judged.benched, verdict, name_of(judged.e), judged.outcome)
                 : verdict_record(origin(), judged.e, verdict, judged.upstream, name_of(judged.e), judged.outcome,
                                  judged.server_end));
    }
    bool on_tick() override
    {
        ++ticks;
        return ticks < ends_after;
    }
    void on_end() override
    {
        events.push_back(feed_.intake().events());
        feed_.intake().upstreams().for_each([&](const UpstreamKey* key, const Upstream& upstream) {
            keep(upstream_record(origin(), feed_.now_ns(), key, upstream, Exposure{}));
        });
    }

    std::vector<Cause> verdicts;
    std::vector<std::uint64_t> events; ///< of each run
    std::vector<std::string> names;
    int ticks = 0;
    int ends_after = 1'000'000;
    std::size_t bytes = 0;

private:
    [[nodiscard]] Origin origin() const { return {.host_name = feed_.facts().host_name, .clock = feed_.clock()}; }
    [[nodiscard]] std::string name_of(const event& e)
    {
        names.push_back(process_name(e.connection, feed_.names()));
        return names.back();
    }
    void keep(const Json& record) { bytes += to_line(record).size(); }

    const Feed& feed_;
    StateHistories histories_;
};

const std::uint64_t settled = crossing().timestamp_ns + 1'000 * ms;

} // namespace

TEST_CASE("what was told before the first tick, or after the last, is judged at the end", "[replay]")
{
    const Folder folder;
    Replay feed({}, true, {folder.holding("r", text_of({header("one"), RecordedClock{0}, crossing()}))});
    Clerk clerk(feed);
    feed.run(clerk);
    CHECK(clerk.verdicts == std::vector{Cause::keepalive_race});
    CHECK(clerk.events == std::vector<std::uint64_t>{1});
    CHECK_FALSE(feed.failed());
}

TEST_CASE("each run begins anew, whatever file it is in", "[replay]")
{
    const Folder folder;
    const std::string one = text_of(
        {header("one", 1, 1), header("one", 1, 1), crossing(), crossing(), RecordedTick{settled}, RecordedEnd{true}});
    const std::string two = text_of({header("two", 1, 2), crossing(), RecordedTick{settled}, RecordedEnd{true}});
    const bool in_one_file = GENERATE(true, false);
    Replay feed({}, true,
                in_one_file ? std::vector{folder.holding("both", one + two)}
                            : std::vector{folder.holding("2", two), folder.holding("1", one)});
    Clerk clerk(feed);
    feed.run(clerk);
    CHECK(clerk.events == std::vector<std::uint64_t>{2, 1});
    CHECK(clerk.verdicts.size() == 3);
}

TEST_CASE("connections that the filter does not let through are counted, by upstream and run", "[replay]")
{
    const Folder folder;
    event opened = crossing();
    opened.kind = EVENT_OPENED;
    event elsewhere = opened;
    elsewhere.peer_port = 9000;
    event ended = elsewhere;
    ended.kind = EVENT_CLOSED;
    event older = ended;
    older.connection.flags |= CONNECTION_ADOPTED;
    const std::string one = text_of({header("one", 1, 1), opened, elsewhere, ended, older, RecordedEnd{true}});
    const std::string two = text_of({header("two", 1, 2), elsewhere, RecordedEnd{true}});
    struct Counter final : Listener {
        explicit Counter(const Feed& feed) : feed_(feed) {}
        void on_event(const event& e) override { ports.push_back(e.peer_port); }
        void on_verdict(const Judged& /*judged*/) override {}
        bool on_tick() override { return true; }
        void on_passed_over(const event& e) override { counts.add(e, feed_.names()); }
        void on_end() override
        {
            runs.push_back(counts.take());
            older.push_back(feed_.intake().adopted_ended());
        }
        PassedOverCounts counts;
        std::vector<std::uint16_t> ports;
        std::vector<std::map<UpstreamKey, PassedOver>> runs;
        std::vector<std::uint64_t> older;

    private:
        const Feed& feed_;
    };
    Filter filter{.upstreams = {parse_address_pattern(":8000")}};
    Replay feed(filter, true, {folder.holding("both", one + two)});
    Counter counter(feed);
    feed.run(counter);
    CHECK(counter.ports == std::vector<std::uint16_t>{8000});
    REQUIRE(counter.runs.size() == 2);
    REQUIRE(counter.runs[0].size() == 1);
    const auto& [where, passed] = *counter.runs[0].begin();
    CHECK(where == UpstreamKey::of(elsewhere));
    CHECK(passed.process == "nginx");
    CHECK(passed.begun == 1);
    CHECK(passed.ended == 2);
    CHECK(counter.runs[1].at(UpstreamKey::of(elsewhere)).ended == 0);
    CHECK(counter.older == std::vector<std::uint64_t>{1, 0}); // what the filter leaves out is no longer open either
}

TEST_CASE("parts are one run, in their order; the same part twice is refused", "[replay]")
{
    const Folder folder;
    const std::string first =
        folder.holding("a", text_of({header("one", 1, 9), crossing(), RecordedTick{1}, RecordedEnd{false}}));
    const std::string second =
        folder.holding("b", text_of({header("one", 2, 5), crossing(), RecordedTick{settled}, RecordedEnd{true}}));
    Replay feed({}, true, {second, first});
    Clerk clerk(feed);
    feed.run(clerk);
    CHECK(clerk.events == std::vector<std::uint64_t>{2});
    CHECK_THROWS_AS(Replay({}, true, {first, second, folder.holding("c", text_of({header("one", 2, 5)}))}), UsageError);
    CHECK_THROWS_AS(Replay({}, true, {first, folder.at("nothing")}), RecordingError);
}

TEST_CASE("a run of another version costs itself and what follows in its file", "[replay]")
{
    const Folder folder;
    std::string later = encode(header("two"));
    const std::string before = text_of({header("one"), crossing(), RecordedTick{settled}, RecordedEnd{true}});
    Replay whole({}, true, {folder.holding("r", before + "finrace-recording 1 0\n" + text_of({crossing()}))});
    Clerk clerk(whole);
    whole.run(clerk);
    CHECK(clerk.verdicts.size() == 1); // damaged, and what follows is whose?
    CHECK_FALSE(whole.failed());
    // The CRC-32 is that of "2 {}".
    Replay other({}, true, {folder.holding("s", before + "finrace-recording 2 " + "a154046a" + " {}\n")});
    Clerk witness(other);
    other.run(witness);
    CHECK(witness.verdicts.size() == 1);
    CHECK(other.failed());
}

TEST_CASE("names are as they were noted", "[replay]")
{
    const Folder folder;
    event nameless = crossing();
    set_name(nameless, "");
    nameless.connection.pid = static_cast<std::uint32_t>(::getpid()); // which has a name now
    const RecordedProcess process{nameless.connection.pid, {'o', 'd', 'd'}};
    Replay feed({}, true,
                {folder.holding("r", text_of({header("one"), nameless, RecordedTick{1}, process, nameless,
                                              RecordedTick{settled}, RecordedEnd{true}}))});
    Clerk clerk(feed);
    feed.run(clerk);
    CHECK(clerk.names == std::vector<std::string>{"", "odd"});
}

TEST_CASE("events that no kernel would tell break nothing", "[replay]")
{
    const Folder folder;
    std::mt19937_64 random(23);
    std::uint64_t verdicts = 0;
    for (int turn = 0; turn < 60; ++turn) {
        std::vector<RecordingEntry> entries{header("one")};
        entries.emplace_back(RecordedClock{static_cast<std::int64_t>(random() >> 2U) - (1LL << 61U)});
        std::get<RecordingHeader>(entries.front()).facts.tells_outcomes = turn % 2 == 0;
        for (int i = 0; i < 300; ++i) {
            event e = crossing();
            auto* bytes = reinterpret_cast<unsigned char*>(&e);
            for (std::uint64_t change = random() % 40; change > 0; --change)
                bytes[random() % sizeof(e)] = static_cast<unsigned char>(random() % 3 == 0 ? 0xff : random());
            e.kind = static_cast<std::uint8_t>(1 + random() % (EVENT_KINDS - 1));
            e.connection.id = random() % 8;
            e.connection.pid = static_cast<std::uint32_t>(random() % 4);
            entries.emplace_back(e);
            if (i % 7 == 0)
                entries.emplace_back(RecordedTick{random() >> (2U + random() % 30U)});
        }
        Replay feed({}, true, {folder.holding("r", text_of(entries))});
        Clerk clerk(feed);
        feed.run(clerk);
        verdicts += clerk.verdicts.size();
    }
    CHECK(verdicts > 100);
}

// ---------------------------------------------------------------------------------------------------------- the
// recorder

namespace {

class Records {
public:
    explicit Records(const std::string& path, std::uint64_t rotate_bytes = 64U << 10U, unsigned keep = 4)
        : recorder({.path = path, .rotate_bytes = rotate_bytes, .keep = keep})
    {
        recorder.begin(header("one").facts, {}, true, clock);
    }

    /// So many events, one at a look.
    void take(int count)
    {
        for (int i = 0; i < count; ++i) {
            event e = crossing();
            e.timestamp_ns = next_ns += ms;
            recorder.add(e);
            recorder.add(RecordedTick{e.timestamp_ns});
        }
    }
    void end() { recorder.end({}); }

    WallClock clock{0};
    std::uint64_t next_ns = crossing().timestamp_ns;
    Recorder recorder;
};

std::uint64_t events_in(const std::vector<std::string>& paths)
{
    Replay feed({}, true, paths);
    Clerk clerk(feed);
    feed.run(clerk);
    std::uint64_t sum = 0;
    for (const std::uint64_t events : clerk.events)
        sum += events;
    return sum;
}

} // namespace

TEST_CASE("files are rotated by size, and so many are kept", "[recorder]")
{
    const Folder folder;
    Records records(folder.at("r"), 64U << 10U, 2);
    records.take(2000); // some 600 kB
    records.end();
    CHECK(std::filesystem::exists(folder.at("r.2")));
    CHECK_FALSE(std::filesystem::exists(folder.at("r.3")));
    CHECK_FALSE(std::filesystem::exists(folder.at("r.new")));
    const std::uint64_t kept = events_in({folder.at("r"), folder.at("r.1"), folder.at("r.2")});
    CHECK(kept > 400);
    CHECK(kept < 1000);

    Records alone(folder.at("alone"), 64U << 10U, 0);
    alone.take(1000);
    alone.end();
    CHECK_FALSE(std::filesystem::exists(folder.at("alone.1")));
    CHECK(events_in({folder.at("alone")}) < 300);
}

TEST_CASE("where a file can't be rotated it grows on, and none is lost", "[recorder]")
{
    const Folder folder;
    std::filesystem::create_directories(folder.at("r.1/in"));
    std::filesystem::create_directories(folder.at("r.2/in"));
    Records records(folder.at("r"), 64U << 10U, 2);
    records.take(1000);
    records.end();
    CHECK(events_in({folder.at("r")}) == 1000);
    CHECK(std::filesystem::is_directory(folder.at("r.2/in")));
    CHECK_FALSE(std::filesystem::exists(folder.at("r.new")));
}

TEST_CASE("a file that somebody moves is left to him, and the recording goes on in a new one", "[recorder]")
{
    const Folder folder;
    Records records(folder.at("r"));
    records.take(10);
    std::filesystem::rename(folder.at("r"), folder.at("moved"));
    records.recorder.add(records.clock, {});
    records.take(5);
    records.end();
    CHECK(events_in({folder.at("moved")}) == 10);
    CHECK(events_in({folder.at("r")}) == 5);
    CHECK(events_in({folder.at("r"), folder.at("moved")}) == 15);
}

TEST_CASE("what is dropped before a file begins is told behind its header", "[recorder]")
{
    const Folder folder;
    Records records(folder.at("r"), 1U << 30U);
    ::signal(SIGXFSZ, SIG_IGN);
    rlimit before{};
    REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
    const rlimit full{.rlim_cur = 64U << 10U, .rlim_max = before.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &full) == 0);
    records.take(40'000); // more than waits
    std::filesystem::rename(folder.at("r"), folder.at("moved"));
    REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
    ::signal(SIGXFSZ, SIG_DFL);
    REQUIRE(records.recorder.dropped() > 0);
    records.recorder.add(records.clock, {});
    records.take(5);
    records.end();
    std::ifstream file(folder.at("r"));
    std::string line;
    std::getline(file, line);
    CHECK(line.starts_with("finrace-recording"));
    RecordingReader reader(folder.at("r"));
    std::uint64_t gaps = 0;
    while (const std::optional<RecordingEntry> entry = reader.next())
        gaps += std::holds_alternative<RecordedGap>(*entry) ? 1 : 0;
    CHECK(gaps == 1);
    CHECK(reader.damaged_lines() == 0);
}

TEST_CASE("one recorder writes to a file, and a link to it stays one", "[recorder]")
{
    const Folder folder;
    Records records(folder.at("r"));
    CHECK_THROWS_WITH(Records(folder.at("r")), Catch::Contains("another recorder"));
    std::filesystem::create_symlink(folder.at("linked"), folder.at("link"));
    Records through(folder.at("link"), 64U << 10U, 2);
    through.take(600);
    through.end();
    CHECK(std::filesystem::is_symlink(folder.at("link")));
    CHECK(std::filesystem::exists(folder.at("linked.1")));
}

TEST_CASE("a recording is added to another, but to nothing else", "[recorder]")
{
    const Folder folder;
    for (int i = 0; i < 2; ++i) {
        Records records(folder.at("r"));
        records.take(3);
        records.end();
    }
    CHECK(events_in({folder.at("r")}) == 6);
    CHECK_THROWS_AS(Records(folder.holding("notes", "milk, bread\n")), OutputError);
    CHECK(std::filesystem::file_size(folder.at("notes")) == 12);
    // Damaged, or of another version: it is kept, beside.
    Records records(folder.holding("old", "finrace-recording 1 x\n"));
    records.take(2);
    records.end();
    CHECK(events_in({folder.at("old")}) == 2);
    CHECK(std::filesystem::file_size(folder.at("old.1")) == 22);
    CHECK_THROWS_WITH(Records(folder.holding("older", "finrace-recording 1 x\n"), 64U << 10U, 0),
                      Catch::Contains("--keep 0"));
}

TEST_CASE("what the disk does not take is counted, each line once", "[recorder]")
{
    Records records("/dev/full");
    records.take(40'000); // more than waits
    records.end();
    CHECK(records.recorder.events() == 40'000);
    CHECK(records.recorder.dropped() >= 80'000);
    CHECK(records.recorder.dropped() < 80'010);
}
