// SPDX-License-Identifier: GPL-2.0-only OR MIT
// source/recording: what is written is read back as it was; of what is damaged, all that is whole.
#include <array>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include <fcntl.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <fmt/format.h>
#include <zlib.h>

#include "folder.h"
#include "source/recording.h"

using namespace finrace;
using namespace finrace::test;

namespace {

/// Any bytes, but for what no source would write.
void make_sound(event& e)
{
    connection& c = e.connection;
    for (auto* ns : {&e.timestamp_ns, &e.sent_ns, &e.received_ns, &c.opened_ns, &c.request_ns, &c.last_byte_ns,
                     &c.peer_fin_ns, &c.peer_reset_ns, &c.local_close_ns})
        *ns >>= 2U;
}

event some_event(unsigned char fill = 0)
{
    event e;
    std::memset(&e, fill, sizeof(e));
    e.version = FINRACE_EVENT_VERSION;
    e.kind = EVENT_CLOSED;
    e.family = 4;
    e.old_state = e.new_state = e.connection.state = TCP_STATE_CLOSE;
    make_sound(e);
    return e;
}

RecordingHeader some_header(const std::string& run = "one", std::uint32_t part = 1)
{
    return {
        .version = "0.1.0",
        .run = run,
        .part = part,
        .written_ns = 1'700'000'000'000'000'000,
        .facts = {.host_name = "proxy\n1",
                  .backend = "trace",
                  .attach = "kprobe",
                  .tells_outcomes = true,
                  .missing = {{.name = "tp/x", .attached = false, .required = false, .purpose = "y", .problem = "z"}}},
        .filter = {"--process nginx"}};
}

bool same(const event& one, const event& other)
{
    return std::memcmp(&one, &other, sizeof(one)) == 0;
}

std::string text_of(const std::vector<RecordingEntry>& entries)
{
    std::string text;
    for (const RecordingEntry& entry : entries)
        text += encode(entry) + "\n";
    return text;
}

std::string with_sum(const std::string& format, const std::string& json)
{
    const std::string text = format + " " + json;
    const auto sum = ::crc32(0, reinterpret_cast<const Bytef*>(text.data()), static_cast<uInt>(text.size()));
    return fmt::format("finrace-recording {} {:08x} {}", format, sum, json);
}

std::vector<RecordingEntry> all_of(RecordingReader& reader)
{
    std::vector<RecordingEntry> entries;
    while (auto entry = reader.next())
        entries.push_back(*entry);
    return entries;
}

} // namespace

TEST_CASE("an event comes back byte for byte, and no line breaks within one", "[recording]")
{
    std::mt19937 random(7);
    for (int turn = 0; turn < 300; ++turn) {
        event e = some_event();
        auto* bytes = reinterpret_cast<unsigned char*>(&e);
        for (std::size_t i = 0; i < sizeof(e); ++i)
            bytes[i] = turn % 3 == 0   ? '\n'
                       : turn % 3 == 1 ? static_cast<unsigned char>(random())
                                       : static_cast<unsigned char>(turn);
        e.version = FINRACE_EVENT_VERSION;
        e.kind = EVENT_PEER_FIN;
        e.family = 6;
        e.old_state = e.new_state = e.connection.state = TCP_STATE_LISTEN; // '\n' as a number
        make_sound(e);
        const std::string line = encode(e);
        CHECK(line.find('\n') == std::string::npos);
        CHECK(line.size() <= sizeof(e) + 8);
        const auto back = decode(line);
        REQUIRE(back);
        CHECK(same(std::get<event>(*back), e));
    }
}

TEST_CASE("every entry comes back as it was", "[recording]")
{
    SourceCounts counts{.connections_begun = 10, .connections_adopted = 3, .losses = {}};
    counts.losses.by_place[LOSS_RING_FULL] = 0x0a0a0a;
    CHECK(std::get<RecordedTick>(*decode(encode(RecordedTick{0x0a0a}))).now_ns == 0x0a0a);
    CHECK(std::get<RecordedClock>(*decode(encode(RecordedClock{-5}))).offset_ns == -5);
    CHECK(std::get<RecordedGap>(*decode(encode(RecordedGap{7}))).lines == 7);
    const auto process = std::get<RecordedProcess>(*decode(encode(RecordedProcess{10, {'n', '\n', '\xff'}})));
    CHECK(process.pid == 10);
    CHECK(std::string(process.name.data(), 4) == std::string("n\n\xff\0", 4));
    CHECK(std::get<RecordedEnd>(*decode(encode(RecordedEnd{true}))).run);
    CHECK_FALSE(std::get<RecordedEnd>(*decode(encode(RecordedEnd{false}))).run);
    const auto counted = std::get<SourceCounts>(*decode(encode(counts)));
    CHECK(counted.connections_begun == 10);
    CHECK(counted.connections_adopted == 3);
    CHECK(counted.losses.by_place[LOSS_RING_FULL] == 0x0a0a0a);

    const std::string line = encode(some_header());
    CHECK(line.find('\n') == std::string::npos);
    CHECK(line.starts_with("finrace-recording 1 "));
    const auto header = std::get<RecordingHeader>(*decode(line));
    CHECK(header.run == "one");
    CHECK(header.part == 1);
    CHECK(header.written_ns == some_header().written_ns);
    CHECK(header.facts.host_name == "proxy\n1");
    CHECK(header.facts.backend == "trace");
    CHECK(header.facts.attach == "kprobe");
    CHECK(header.facts.tells_outcomes);
    REQUIRE(header.facts.missing.size() == 1);
    CHECK(header.facts.missing[0].name == "tp/x");
    CHECK(header.facts.missing[0].purpose == "y");
    CHECK(header.facts.missing[0].problem == "z");
    CHECK(header.filter == std::vector<std::string>{"--process nginx"});
    RecordingHeader long_one = some_header();
    long_one.facts.host_name.assign(2000, 'x');
    long_one.filter.assign(200, "y");
    const auto bounded = std::get<RecordingHeader>(*decode(encode(long_one)));
    CHECK(bounded.facts.host_name.size() == 1000);
    CHECK(bounded.filter.size() == 100);
}

TEST_CASE("no damage to a line passes for another entry", "[recording]")
{
    for (const std::string& line : {encode(some_event()), encode(RecordedTick{123}), encode(some_header())}) {
        for (std::size_t i = 0; i < line.size(); ++i)
            for (const int change : {1, 0x80, 0xff}) {
                std::string damaged = line;
                damaged[i] = static_cast<char>(damaged[i] ^ change);
                if (damaged[i] != '\n')
                    CHECK_FALSE(decode(damaged));
            }
        for (std::size_t length = 0; length < line.size(); ++length)
            CHECK_FALSE(decode(line.substr(0, length)));
        CHECK_FALSE(decode(line + "x"));
    }
}

TEST_CASE("an event that no source makes is damage", "[recording]")
{
    const auto refused = [](auto&& change) {
        event e = some_event();
        change(e);
        return !decode(encode(e));
    };
    CHECK_FALSE(refused([](event&) {}));
    CHECK(refused([](event& e) { e.kind = EVENT_KINDS; }));
    CHECK(refused([](event& e) { e.kind = 0; }));
    CHECK_FALSE(refused([](event& e) { e.timestamp_ns = (1ULL << 62U) - 1; }));
    CHECK(refused([](event& e) { e.timestamp_ns = 1ULL << 62U; }));
    CHECK(refused([](event& e) { e.sent_ns = 1ULL << 62U; }));
    CHECK(refused([](event& e) { e.received_ns = 1ULL << 62U; }));
    CHECK(refused([](event& e) { e.connection.opened_ns = 1ULL << 62U; }));
    CHECK(refused([](event& e) { e.connection.request_ns = 1ULL << 62U; }));
    CHECK(refused([](event& e) { e.connection.last_byte_ns = 1ULL << 62U; }));
    CHECK(refused([](event& e) { e.connection.peer_fin_ns = 1ULL << 62U; }));
    CHECK(refused([](event& e) { e.connection.peer_reset_ns = 1ULL << 62U; }));
    CHECK(refused([](event& e) { e.connection.local_close_ns = 1ULL << 62U; }));
    CHECK(decode(encode(RecordedTick{(1ULL << 62U) - 1})));
    CHECK_FALSE(decode(encode(RecordedTick{1ULL << 62U})));
    CHECK(decode(encode(RecordedClock{1 - (1LL << 62U)})));
    CHECK_FALSE(decode(encode(RecordedClock{1LL << 62U})));
    CHECK_FALSE(decode(encode(RecordedClock{-(1LL << 62U)})));
    CHECK(refused([](event& e) { e.family = 5; }));
    CHECK(refused([](event& e) { e.version++; }));
    CHECK(refused([](event& e) { e.old_state = 13; }));
    CHECK(refused([](event& e) { e.new_state = 13; }));
    CHECK(refused([](event& e) { e.connection.state = 13; }));
}

TEST_CASE("a file cut anywhere gives all lines that are whole", "[recording]")
{
    const Folder folder;
    const std::vector<RecordingEntry> entries{some_header(),   RecordedClock{1}, some_event(1),
                                              RecordedTick{2}, some_event(0xff), RecordedEnd{true}};
    const std::string text = text_of(entries);
    const std::size_t header_bytes = text.find('\n') + 1;
    for (std::size_t length = header_bytes; length <= text.size(); ++length) {
        RecordingReader reader(folder.holding("recording", text.substr(0, length)));
        const auto found = all_of(reader);
        const auto lines = static_cast<std::size_t>(
            std::count(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(length), '\n'));
        CHECK(found.size() == lines);
        CHECK(reader.damaged_lines() == 0);
        CHECK(reader.cut_short() == (text[length - 1] != '\n'));
    }
    for (std::size_t length = 0; length < header_bytes; ++length)
        CHECK_THROWS_AS(RecordingReader(folder.holding("recording", text.substr(0, length))), RecordingError);
}

TEST_CASE("damage costs its own lines, and is counted", "[recording]")
{
    const Folder folder;
    const std::string before = text_of({some_header(), some_event(1)});
    const std::string after = text_of({some_event(2), RecordedEnd{true}});
    SECTION("noise between")
    {
        RecordingReader reader(folder.holding("recording", before + "noise\n\n\x01\x02\n" + after));
        CHECK(all_of(reader).size() == 4);
        CHECK(reader.damaged_lines() == 2); // an empty line is what a crash leaves
    }
    SECTION("a line without an end in sight")
    {
        RecordingReader reader(folder.holding("recording", before + std::string(3U << 20U, 'x') + "\n" + after));
        CHECK(all_of(reader).size() == 4);
        CHECK(reader.damaged_lines() == 1);
        CHECK_FALSE(reader.cut_short());
    }
    SECTION("nothing else follows it")
    {
        RecordingReader reader(folder.holding("recording", before + std::string(3U << 20U, 'x')));
        CHECK(all_of(reader).size() == 2);
        CHECK(reader.cut_short());
    }
}

TEST_CASE("what is no recording, or another version of one, is refused with a reason", "[recording]")
{
    const Folder folder;
    const auto reason = [&](const std::string& bytes) -> std::string {
        try {
            RecordingReader reader(folder.holding("recording", bytes));
            all_of(reader);
        } catch (const RecordingError& error) {
            return error.what();
        }
        return {};
    };
    CHECK_THAT(reason(""), Catch::Contains("is empty"));
    CHECK_THAT(reason("{\"event\":{\"name\":\"finrace.verdict\"}}\n"), Catch::Contains("no recording of finrace's"));
    CHECK_THAT(reason("finrace-reco"), Catch::Contains("damaged"));
    CHECK_THAT(reason("finrace-recording 1 {\n"), Catch::Contains("damaged"));
    CHECK_THAT(reason(with_sum("1", "{\"event\":5}") + "\n"), Catch::Contains("damaged"));
    CHECK_THAT(reason(with_sum("2", "{}") + "\n"), Catch::Contains("another than 1"));
    std::string other = encode(some_header()).substr(std::string("finrace-recording 1 01234567 ").size());
    const std::string version = "\"version\":" + std::to_string(FINRACE_EVENT_VERSION);
    other.replace(other.find(version), version.size(), "\"version\":99");
    other = with_sum("1", other) + "\n";
    CHECK_THAT(reason(other), Catch::Contains("events are of version 99"));
    CHECK_THAT(reason(text_of({some_header()}) + other), Catch::Contains("cannot read on"));
    // Numbers that are none, or of another kind; a header that is longer than any.
    const std::string json = encode(some_header()).substr(std::string("finrace-recording 1 01234567 ").size());
    for (const char* part : {"0", "-1", "1e300", "4611686018427387904", "\"1\"", "1.5"}) {
        std::string odd = json;
        odd.replace(odd.find("\"part\":1"), 8, std::string("\"part\":") + part);
        CHECK_THAT(reason(with_sum("1", odd) + "\n"), Catch::Contains("damaged"));
    }
    CHECK_THAT(
        reason(with_sum("1", json.substr(0, json.size() - 1) + ",\"x\":\"" + std::string(70'000, 'x') + "\"}") + "\n"),
        Catch::Contains("damaged"));
    CHECK_THROWS_WITH(RecordingReader("/nonexistent/recording"), Catch::Contains("No such file"));
    CHECK_THROWS_WITH(RecordingReader("/"), Catch::Contains("Is a directory"));
}

TEST_CASE("a header that is damaged costs what follows it, up to the next; its second copy makes up for it",
          "[recording]")
{
    const Folder folder;
    std::string broken = text_of({some_header()});
    broken[broken.size() / 2] ^= 1;
    const std::string good = text_of({some_header()});
    const std::string other = text_of({some_header("two")});
    const std::string told = text_of({some_event(1), RecordedTick{1}});
    const auto entries = [&](const std::string& text, std::uint64_t damaged) {
        RecordingReader reader(folder.holding("recording", text));
        const std::size_t count = all_of(reader).size();
        CHECK(reader.damaged_lines() == damaged);
        return count;
    };
    CHECK(entries(broken + good + told, 1) == 3);
    CHECK(entries(good + broken + told, 1) == 3);
    CHECK(entries(broken + told + good + told, 3) == 3);
    CHECK(entries(good + told + broken + told + other + told, 3) == 6);
    CHECK_THROWS_WITH(RecordingReader(folder.holding("recording", broken + told)),
                      Catch::Contains("its header is damaged"));
}

TEST_CASE("noise never breaks the reader", "[recording]")
{
    const Folder folder;
    std::mt19937 random(11);
    const std::string whole =
        text_of({some_header(), some_event(3), RecordedTick{1}, some_event(4), RecordedEnd{true}});
    for (int turn = 0; turn < 2000; ++turn) {
        std::string text = whole;
        for (unsigned change = 0; change < 1 + random() % 8; ++change)
            text[random() % text.size()] = static_cast<char>(random());
        try {
            RecordingReader reader(folder.holding("recording", text));
            CHECK(all_of(reader).size() <= 5);
        } catch (const RecordingError&) { // its first line
        }
    }
}
