// SPDX-License-Identifier: GPL-2.0-only OR MIT
// source/capture, source/follower and cli/capture_feed: what is on the wire is read whatever it is wrapped in, and is
// judged alike wherever on the way it was captured; what a capture lacks is counted, and never guessed.
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "capture_file.h"
#include "cli/capture_feed.h"
#include "core/cause.h"
#include "core/units.h"

using namespace finrace;
using namespace finrace::test;

namespace {

constexpr std::uint64_t ms = Talk::ms;

Input input_of(const std::string& bytes)
{
    const int fd = ::memfd_create("capture", MFD_CLOEXEC);
    REQUIRE(fd >= 0);
    REQUIRE(::write(fd, bytes.data(), bytes.size()) == static_cast<::ssize_t>(bytes.size()));
    REQUIRE(::lseek(fd, 0, SEEK_SET) == 0);
    Input input = open_input("/proc/self/fd/" + std::to_string(fd));
    ::close(fd);
    return input;
}

/// All that a capture comes to.
class Found final : public Listener {
public:
    explicit Found(const CaptureFile& file, Filter filter = {}) : Found(file.bytes(), std::move(filter)) {}
    explicit Found(const std::string& bytes, Filter filter = {})
    {
        std::vector<Input> inputs;
        inputs.push_back(input_of(bytes));
        feed.emplace(std::move(filter), std::move(inputs));
        feed->run(*this);
    }

    void on_event(const event& e) override
    {
        events.push_back(e);
        kinds.push_back(e.kind);
    }
    void on_verdict(const Judged& judged) override { verdicts.push_back(*judged.classification.verdict); }
    bool on_tick() override { return true; }
    void on_end() override
    {
        feed->intake().upstreams().for_each([this](const UpstreamKey*, const Upstream& one) { upstream = one; });
        unclassified = feed->intake().unclassified();
    }

    [[nodiscard]] std::string said() const
    {
        std::string text;
        for (const Verdict& verdict : verdicts)
            text += std::string(text.empty() ? "" : ", ") + std::string(to_string(verdict.cause)) +
                    (verdict.variant == Variant::none ? "" : "/" + std::string(to_string(verdict.variant))) + " " +
                    std::string(to_string(verdict.certainty)) + (verdict.incomplete ? " incomplete" : "");
        return text;
    }
    [[nodiscard]] const CaptureFacts& facts() const { return feed->captures().front(); }

    std::vector<event> events;
    std::vector<int> kinds;
    std::vector<Verdict> verdicts;
    Upstream upstream;
    std::uint64_t unclassified = 0;
    std::optional<CaptureFeed> feed;
};

std::string segment_to(std::uint16_t port, std::string_view payload = "GET / HTTP/1.1\r\n\r\n", std::size_t options = 0)
{
    return tcp({40000, port, 5000, 7000, TCP_FLAG_BIT_ACK, options}, payload);
}

std::optional<Segment> decoded(int link_type, const std::string& packet, std::size_t captured = std::string::npos,
                               CaptureCounts* counts = nullptr)
{
    CaptureCounts here;
    return Decoder(link_type).decode(reinterpret_cast<const std::uint8_t*>(packet.data()),
                                     std::min(captured, packet.size()), packet.size(),
                                     counts != nullptr ? *counts : here);
}

/// The request and the FIN are under way at once. `far_ms`: of the round trip, what lies beyond the place of the
/// capture.
void cross(Talk& talk, double near_ms, double far_ms)
{
    talk.open(far_ms, near_ms);
    talk.wait_ms(1);
    talk.request();
    talk.wait_ms(far_ms);
    talk.server_hears();
    talk.response();
    talk.client_hears();
    talk.wait_ms(near_ms);
    talk.client_acks();
    talk.wait_ms(5000);
}

} // namespace

TEST_CASE("a segment is found behind every link's header", "[capture]")
{
    const std::string packet = ipv4(1, 2, segment_to(80));
    const auto [link, frame] = GENERATE_COPY(table<int, std::string>({
        {DLT_EN10MB, ethernet(0x0800, packet)},
        {DLT_EN10MB, ethernet(0x0800, packet, vlan_tag(0x8100, 7))},
        {DLT_EN10MB, ethernet(0x0800, packet, vlan_tag(0x88a8, 7) + vlan_tag(0x8100, 8))},
        {DLT_EN10MB, ethernet(0x0800, packet) + std::string(18, '\0')}, // padding
        {DLT_LINUX_SLL, sll(0, packet)},
        {DLT_LINUX_SLL2, sll2(4, 3, packet)},
        {DLT_RAW, packet},
        {DLT_IPV4, packet},
        {DLT_NULL, std::string("\2\0\0\0", 4) + packet},
        {DLT_LOOP, std::string("\0\0\0\2", 4) + packet},
        {DLT_PPP, std::string("\xff\x03\x00\x21", 4) + packet},
        {DLT_PPP, std::string("\x00\x21", 2) + packet},
    }));
    const auto segment = decoded(link, frame);
    REQUIRE(segment);
    CHECK(segment->source.port == 40000);
    CHECK(segment->target.port == 80);
    CHECK(segment->source.address[3] == 1);
    CHECK(segment->seq == 5000);
    CHECK(segment->ack == 7000);
    CHECK(segment->flags == TCP_FLAG_BIT_ACK);
    CHECK(segment->payload == 18);
    CHECK(segment->first == FINRACE_FOUR('G', 'E', 'T', ' '));
    CHECK(segment->family == 4);
    // Cut at any place it is unreadable or nothing, and never read beyond.
    for (std::size_t captured = 0; captured < frame.size(); ++captured) {
        const std::string cut(frame, 0, captured);
        CaptureCounts counts;
        const auto part =
            Decoder(link).decode(reinterpret_cast<const std::uint8_t*>(cut.data()), cut.size(), frame.size(), counts);
        if (part)
            CHECK(part->payload == 18);
    }
}

TEST_CASE("the direction shows in a capture of all devices", "[capture]")
{
    const std::string packet = ipv4(1, 2, segment_to(80));
    CHECK(decoded(DLT_LINUX_SLL2, sll2(0, 1, packet))->heading == Heading::inwards);
    CHECK(decoded(DLT_LINUX_SLL2, sll2(4, 1, packet))->heading == Heading::outwards);
    CHECK(decoded(DLT_LINUX_SLL, sll(4, packet))->heading == Heading::outwards);
    CHECK(decoded(DLT_EN10MB, ethernet(0x0800, packet))->heading == Heading::unknown);
}

TEST_CASE("options, extension headers and fragments", "[capture]")
{
    CHECK(decoded(DLT_RAW, ipv4(1, 2, segment_to(80, "abcdefgh", 12), 61, 8))->payload == 8);
    CHECK(decoded(DLT_RAW, ipv4(1, 2, segment_to(80), 61))->hops == 3);
    CHECK(decoded(DLT_RAW, ipv6(1, 2, segment_to(80)))->family == 6);
    const std::string hop_by_hop = std::string("\x3c\0\1\4\0\0\0\0", 8); // then destination options
    const std::string destination = std::string("\6\0\1\4\0\0\0\0", 8);
    const auto segment = decoded(DLT_RAW, ipv6(1, 2, segment_to(80), hop_by_hop + destination, IPPROTO_HOPOPTS));
    REQUIRE(segment);
    CHECK(segment->payload == 18);
    CHECK(segment->target.address[15] == 2);

    CaptureCounts counts;
    CHECK_FALSE(decoded(DLT_RAW, ipv4(1, 2, segment_to(80), 64, 0, 0x0010), std::string::npos, &counts));
    CHECK(counts.unreadable == 1);
    CHECK(decoded(DLT_RAW, ipv4(1, 2, segment_to(80), 64, 0, 0x2000))); // the first of them
    const std::string later = std::string("\6\0\0\x10\0\0\0\1", 8);
    CHECK_FALSE(decoded(DLT_RAW, ipv6(1, 2, segment_to(80), later, IPPROTO_FRAGMENT), std::string::npos, &counts));
    CHECK(counts.unreadable == 2);
    CHECK_FALSE(decoded(DLT_RAW, ipv4(1, 2, segment_to(80), 64, 0, 0, IPPROTO_UDP), std::string::npos, &counts));
    CHECK(counts.unreadable == 2);
}

TEST_CASE("a packet that was cut keeps its length, and without a header it is counted", "[capture]")
{
    const std::string frame = ethernet(0x0800, ipv4(1, 2, segment_to(80)));
    const auto segment = decoded(DLT_EN10MB, frame, 14 + 20 + 20);
    REQUIRE(segment);
    CHECK(segment->payload == 18);
    CHECK(segment->first == 0);
    CaptureCounts counts;
    CHECK_FALSE(decoded(DLT_EN10MB, frame, 14 + 20 + 13, &counts));
    CHECK(counts.unreadable == 1);
}

TEST_CASE("what is no capture that can be read says what it is", "[capture]")
{
    const auto read = [](const std::string& bytes) { CaptureReader reader(input_of(bytes)); };
    CHECK_THROWS_WITH(read(CaptureFile(105).bytes()), Catch::Contains("IEEE802_11") && Catch::Contains("-i any"));
    CHECK_THROWS_AS(read(CaptureFile().bytes().substr(0, 10)), InputError);
    CHECK_THROWS_WITH(open_input("/nonexistent/capture"), Catch::Contains("No such file"));
    CHECK(input_of(CaptureFile().bytes()).kind == InputKind::capture);
    CHECK(input_of("\x0a\x0d\x0d\x0a and more").kind == InputKind::capture);
    CHECK(input_of("\x1f\x8b\x08\x00").kind == InputKind::compressed);
    CHECK(input_of(R"({"timestamp":1})").kind == InputKind::json);
    CHECK(input_of("finrace-recording 1").kind == InputKind::other);
    CHECK(input_of("").kind == InputKind::other);
    Filter by_process;
    by_process.processes.push_back({.pid = 1, .name = {}});
    CHECK_THROWS_WITH(Found(CaptureFile(), by_process), Catch::Contains("--process"));
    Filter servers;
    servers.side = Side::server;
    CHECK_THROWS_WITH(Found(CaptureFile(), servers), Catch::Contains("--side server"));
}

TEST_CASE("a capture that is cut short gives what is whole, and says so", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    cross(talk, 0.01, 20);
    talk.request();
    talk.wait_ms(0.1);
    talk.server_fin();
    talk.wait_ms(1);
    talk.client_hears();
    talk.client_fin();
    const std::size_t whole = file.bytes().size();
    talk.wait_ms(5000);
    talk.client_acks();
    const Found found(file.bytes().substr(0, whole + 20));
    CHECK(found.said() == "keepalive_race/fin_crossed proven");
    CHECK(found.feed->missing() == 1);
    CHECK_FALSE(found.feed->failed());
}

TEST_CASE("pcapng tells the same as pcap", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    cross(talk, 0.01, 20);
    talk.request();
    talk.wait_ms(0.1);
    talk.server_fin();
    talk.wait_ms(1);
    talk.client_hears();
    talk.client_fin();
    const Found pcap(file);
    const Found pcapng(pcapng_of(file.bytes()));
    CHECK(pcapng.said() == "keepalive_race/fin_crossed proven");
    CHECK(pcapng.kinds == pcap.kinds);
    REQUIRE_FALSE(pcap.events.empty());
    CHECK(pcapng.events.back().timestamp_ns == pcap.events.back().timestamp_ns);
    CHECK(pcapng.feed->missing() == 0);
}

TEST_CASE("an answer that is captured before its SYN repeats nothing", "[capture]")
{
    CaptureFile file;
    const std::string syn =
        ethernet(0x0800, ipv4(0x0a000001, 0x0a000002, tcp({40000, 80, 10, 0, TCP_FLAG_BIT_SYN}, "")));
    const std::string answer = ethernet(
        0x0800, ipv4(0x0a000002, 0x0a000001, tcp({80, 40000, 20, 11, TCP_FLAG_BIT_SYN | TCP_FLAG_BIT_ACK}, "")));
    const std::string ack =
        ethernet(0x0800, ipv4(0x0a000001, 0x0a000002, tcp({40000, 80, 11, 21, TCP_FLAG_BIT_ACK}, "")));
    file.add(capture_epoch_ns, answer);
    file.add(capture_epoch_ns + 1000, syn);
    file.add(capture_epoch_ns + 2000, ack);
    const Found found(file);
    REQUIRE(found.kinds == std::vector<int>{EVENT_OPENED});
    CHECK(found.events.front().retransmits == 0);
    CHECK(found.feed->missing() == 0);
}

TEST_CASE("a healthy connection: its requests, the upstream's idle close, and what that teaches", "[capture]")
{
    CaptureFile file;
    for (std::uint16_t port = 40000; port < 40005; ++port) {
        Talk talk(file, port);
        talk.now_ns += port * 10'000 * ms;
        talk.open();
        talk.exchange();
        talk.wait_ms(700);
        talk.exchange();
        talk.wait_ms(5000);
        talk.server_fin();
        talk.client_hears();
        talk.wait_ms(0.1);
        talk.client_fin();
    }
    const Found found(file);
    CHECK(found.said().empty());
    CHECK(found.unclassified == 0);
    CHECK(found.upstream.counts.opened == 5);
    CHECK(found.upstream.counts.closed == 5);
    CHECK(found.upstream.counts.exchanges == 10);
    CHECK(found.upstream.counts.idle_closes_by_peer == 5);
    REQUIRE(found.upstream.idle_timeout.timeout());
    CHECK(found.upstream.idle_timeout.timeout()->ms == 5000);
    CHECK(found.upstream.longest_reused_idle_ms == 700);
    CHECK(found.feed->missing() == 0);
    CHECK(found.facts().vantage.place == TakenAt::client);
    CHECK(found.facts().vantage.sure);
    REQUIRE(found.events.size() == 20);
    CHECK(found.events[0].srtt_us == Approx(20'010));
    CHECK(found.events[0].connection.idle_ms == 0);
}

// At the client's end, the FIN is captured after the request; at the upstream's end before it, or after it.
TEST_CASE("a FIN that crosses the request is the same race from either end, and on the way", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    const auto [near_ms, far_ms] = GENERATE(table<double, double>({{0.01, 20}, {20, 0.02}, {10, 10}}));
    cross(talk, near_ms, far_ms);
    const bool request_first = near_ms < far_ms || GENERATE(true, false);
    if (request_first)
        talk.request();
    else
        talk.server_fin();
    talk.wait_ms(0.005);
    if (request_first)
        talk.server_fin();
    else
        talk.request();
    talk.wait_ms(near_ms + 0.1);
    talk.client_hears();
    talk.client_fin();
    talk.wait_ms(1);
    talk.server_bare_reset();
    const Found found(file);
    CHECK(found.said() == "keepalive_race/fin_crossed proven");
    REQUIRE(found.kinds.size() >= 4);
    CHECK(found.kinds[0] == EVENT_OPENED);
    CHECK(found.kinds[1] == EVENT_PEER_FIN);
    CHECK(found.kinds[2] == EVENT_LOCAL_FIN);
    CHECK(found.kinds.back() == EVENT_CLOSED);
    const event& fin = found.events[1];
    CHECK(fin.connection.exchange == 2);
    CHECK(fin.connection.fin_unacked == Talk::default_request.size());
    CHECK(fin.connection.idle_ms >= 4979);
    CHECK(fin.connection.idle_ms <= 5001);
    CHECK(fin.connection.request_ns <= fin.connection.peer_fin_ns);
    CHECK(fin.srtt_us >= 20'000);
}

TEST_CASE("a request that acknowledges the FIN was written into a closed connection, from either end", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    const auto [near_ms, far_ms] = GENERATE(table<double, double>({{0.01, 20}, {20, 0.02}}));
    cross(talk, near_ms, far_ms);
    talk.server_fin();
    talk.wait_ms(near_ms);
    talk.client_hears();
    if (GENERATE(true, false)) // its kernel may leave the ACK to the request
        talk.client_acks();
    talk.wait_ms(3);
    talk.request();
    talk.wait_ms(far_ms);
    talk.server_bare_reset();
    const Found found(file);
    CHECK(found.said() == "stale_reuse proven");
}

TEST_CASE("an RST in answer to the request, and one that crosses it", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    const auto [near_ms, far_ms] = GENERATE(table<double, double>({{0.01, 20}, {20, 0.02}}));
    cross(talk, near_ms, far_ms);
    SECTION("bare: the socket was gone")
    {
        talk.request();
        talk.wait_ms(far_ms);
        talk.server_bare_reset();
        CHECK(Found(file).said() == "keepalive_race/reset_closed likely");
    }
    SECTION("with ACK, of nothing of the request, whichever is captured first")
    {
        const bool request_first = near_ms < far_ms;
        if (request_first)
            talk.request();
        else
            talk.server_reset();
        talk.wait_ms(0.1);
        if (request_first)
            talk.server_reset();
        else
            talk.request();
        talk.wait_ms(far_ms);
        talk.server_bare_reset();
        CHECK(Found(file).said() == "keepalive_race/reset_crossed proven");
    }
    SECTION("with ACK, of all of it")
    {
        talk.request();
        talk.wait_ms(far_ms);
        talk.server_hears();
        talk.server_reset();
        CHECK(Found(file).said() == "keepalive_race/reset_unread possible");
    }
    SECTION("after a part of the answer")
    {
        talk.request();
        talk.wait_ms(far_ms);
        talk.server_hears();
        talk.response();
        talk.wait_ms(1);
        talk.server_reset();
        CHECK(Found(file).said() == "response_cut likely");
    }
}

TEST_CASE("an answer that was written before the request came is none", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    const bool at_client = GENERATE(true, false);
    cross(talk, at_client ? 0.01 : 20, at_client ? 20 : 0.02);
    if (at_client)
        talk.request();
    talk.response("HTTP/1.1 408 Request Timeout\r\n\r\n");
    talk.server_fin();
    talk.wait_ms(0.01);
    if (!at_client)
        talk.request();
    talk.wait_ms(21);
    talk.client_hears();
    talk.client_fin();
    const Found found(file);
    CHECK(found.said() == "stale_response proven");
}

TEST_CASE("a close on what the upstream had is its application's", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    talk.open();
    talk.request();
    talk.wait_ms(400);
    talk.server_hears();
    talk.server_fin();
    talk.client_hears();
    talk.wait_ms(0.1);
    talk.client_fin();
    CHECK(Found(file).said() == "upstream_closed proven");
}

TEST_CASE("a connection that can't be opened", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    talk.syn();
    SECTION("refused")
    {
        talk.server_hears();
        talk.wait_ms(20);
        talk.server_reset();
        CHECK(Found(file).said() == "connect_refused proven");
    }
    SECTION("unanswered, with a repetition")
    {
        Talk again(file);
        again.now_ns += 1000 * ms;
        again.syn();
        again.wait_ms(4000);
        Talk other(file, 50000);
        other.now_ns = again.now_ns;
        other.open();
        CHECK(Found(file).said() == "connect_timeout likely");
    }
    SECTION("unanswered when the capture ends")
    {
        const Found found(file);
        CHECK(found.said().empty());
        CHECK(found.kinds.empty());
    }
    SECTION("no route, says ICMP")
    {
        std::string icmp("\3\1\0\0\0\0\0\0", 8);
        icmp += ipv4(talk.client_address, talk.server_address, tcp({40000, 80, 1000, 0, TCP_FLAG_BIT_SYN}, ""))
                    .substr(0, 28);
        file.add(talk.now_ns + 3 * ms,
                 ethernet(0x0800, ipv4(0x0a0000fe, talk.client_address, icmp, 64, 0, 0, IPPROTO_ICMP)));
        CHECK(Found(file).said() == "connect_unreachable proven");
    }
}

TEST_CASE("silence until the client's kernel gives up", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    cross(talk, 0.01, 20);
    talk.request();
    for (const double gap_ms : {200.0, 400.0, 800.0}) {
        talk.wait_ms(gap_ms);
        talk.repeat_request();
    }
    Talk other(file, 50000);
    other.now_ns = talk.now_ns;
    SECTION("the next repetition does not come")
    {
        other.wait_ms(5000);
        other.open();
        const Found found(file);
        CHECK(found.said() == "path_dropped likely");
    }
    SECTION("the capture ends before it is due")
    {
        other.wait_ms(1000);
        other.open();
        CHECK(Found(file).said().empty());
    }
}

TEST_CASE("times that lie centuries apart make none that lies beyond all", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    talk.now_ns = 1'000'000'000; // 0 is no time
    cross(talk, 0.01, 20);
    talk.request();
    talk.wait_ms(3.7e12);
    talk.repeat_request();
    Talk other(file, 50000);
    other.now_ns = talk.now_ns;
    other.wait_ms(3e10);
    other.open();
    const Found found(pcapng_of(file.bytes()));
    CHECK(found.said() == "path_dropped likely");
    for (const event& e : found.events)
        CHECK(e.timestamp_ns < latest_ns);
}

TEST_CASE("unanswered probes, until the client's kernel resets", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    cross(talk, 0.01, 20);
    talk.request();
    talk.wait_ms(20);
    talk.server_hears();
    talk.server_acks();
    talk.wait_ms(1000);
    talk.client_probes();
    if (GENERATE(true, false)) {
        talk.wait_ms(1000);
        talk.client_reset();
        talk.wait_ms(10);
        talk.server_fin();
        talk.client_reset();
        CHECK(Found(file).said() == "path_dropped/unanswered_probes possible");
    } else { // right behind it: its process did
        talk.wait_ms(30);
        talk.client_reset();
        const Found found(file);
        CHECK(found.said().empty());
        CHECK(found.unclassified == 1);
    }
}

TEST_CASE("an RST that takes the request after a silence: this host may have given up behind it", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    cross(talk, 0.01, 20);
    talk.request();
    const bool silent = GENERATE(true, false);
    talk.wait_ms(silent ? 500 : 200);
    talk.repeat_request();
    talk.wait_ms(silent ? 600 : 200);
    talk.server_hears();
    talk.server_reset();
    CHECK(Found(file).said() == (silent ? "path_dropped possible" : "upstream_reset likely"));
}

// The path was silent for the first transmission; at the upstream's end only a retransmission is met.
TEST_CASE("a request that the upstream's end meets late: which was first is not known", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    cross(talk, 20, 0.02);
    talk.client_seen = false;
    talk.request();
    talk.client_seen = true;
    talk.wait_ms(1500);
    talk.server_fin();
    talk.wait_ms(20);
    talk.client_hears();
    talk.client_acks();
    talk.wait_ms(400);
    talk.repeat_request();
    talk.wait_ms(0.02);
    talk.server_bare_reset();
    const Found found(file);
    CHECK(found.said().empty());
    CHECK(found.unclassified == 1);
}

TEST_CASE("an RST that was lost behind the upstream's end crossed nothing", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    cross(talk, 20, 0.02);
    talk.server_reset();
    const bool late = GENERATE(true, false);
    talk.wait_ms(late ? 1000 : 33); // its round trip, and more; after so long it may have been sent, and lost, before
    talk.request();
    talk.wait_ms(0.02);
    talk.server_bare_reset();
    const Found found(file);
    CHECK(found.said() == (late ? "" : "keepalive_race/reset_closed likely"));
    CHECK(found.unclassified == (late ? 1 : 0));
}

TEST_CASE("a request that comes late on its way crossed an RST", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    cross(talk, 20, 0.02);
    talk.server_reset();
    talk.wait_ms(32);
    talk.request();
    talk.wait_ms(0.02);
    talk.server_bare_reset();
    CHECK(Found(file).said() == "keepalive_race/reset_crossed proven");
}

TEST_CASE("a FIN that was lost behind the upstream's end crossed nothing, as far as it shows", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    cross(talk, 20, 0.02);
    talk.server_fin();
    const bool late = GENERATE(true, false);
    talk.wait_ms(late ? 1000 : 15);
    talk.request();
    talk.wait_ms(0.02);
    talk.server_bare_reset();
    const Found found(file);
    CHECK(found.said() == (late ? "" : "keepalive_race/fin_crossed proven"));
    CHECK(found.unclassified == (late ? 1 : 0));
}

TEST_CASE("an RST into the stream of a large request ends it, however much of it is under way", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    cross(talk, 20, 0.02);
    const std::string part(1448, 'x');
    talk.request();
    for (int i = 0; i < 40; ++i) {
        talk.wait_ms(1);
        if (i == 10) {
            talk.server_hears();
            talk.server_reset();
        }
        talk.request(part);
    }
    talk.server_bare_reset();
    CHECK(Found(file).said() == "request_rejected possible");
}

TEST_CASE("a client's socket that is gone: its kernel gave up in silence", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    cross(talk, 0.01, 20);
    talk.request();
    for (const double gap_ms : {200.0, 400.0, 800.0}) {
        talk.wait_ms(gap_ms);
        talk.repeat_request();
    }
    talk.wait_ms(700);
    talk.server_fin();
    talk.client_bare_reset();
    CHECK(Found(file).said() == "path_dropped likely");
}

TEST_CASE("the same packet met twice is one", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    talk.times = 2;
    cross(talk, 0.05, 20);
    talk.request();
    talk.wait_ms(0.1);
    talk.server_fin();
    talk.wait_ms(1);
    talk.client_hears();
    talk.client_fin();
    const Found found(file);
    CHECK(found.said() == "keepalive_race/fin_crossed proven");
    CHECK(found.events.back().retransmits == 0);
    CHECK(found.events.back().connection.exchange == 2);
    CHECK(found.upstream.counts.opened == 1);
}

TEST_CASE("a connection that is older than the capture", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    const auto meet = [&](bool from_server) {
        if (from_server) {
            talk.server_hears();
            talk.response();
            talk.client_hears();
            talk.wait_ms(0.1);
            talk.client_acks();
        } else {
            talk.request();
        }
    };
    SECTION("met with an answer, it races at its next request")
    {
        meet(true);
        talk.wait_ms(5000);
        talk.request();
        talk.wait_ms(0.1);
        talk.server_fin();
        talk.wait_ms(1);
        talk.client_hears();
        talk.client_fin();
        const Found found(file);
        CHECK(found.said() == "keepalive_race/fin_crossed proven");
        CHECK(found.feed->counts().connections_adopted == 1);
        CHECK(found.facts().gaps.guessed == 1);
    }
    SECTION("met with a request, how long it had rested is not known")
    {
        meet(false);
        talk.wait_ms(30);
        talk.server_hears();
        talk.server_fin();
        talk.client_hears();
        talk.client_fin();
        CHECK(Found(file).said() == "upstream_closed possible incomplete");
    }
    SECTION("the server is known by another's handshake, against its port")
    {
        talk.server_port = 50000;
        Talk first(file, 1024);
        first.server_port = 50000;
        first.open();
        first.exchange();
        talk.now_ns = first.now_ns;
        meet(true);
        talk.wait_ms(100);
        talk.server_fin();
        talk.client_hears();
        talk.client_fin();
        const Found found(file);
        CHECK(found.facts().gaps.guessed == 0);
        CHECK(found.events.back().peer_port == 50000);
    }
    SECTION("what it says tells who asks")
    {
        talk.server_port = 50000;
        meet(false);
        talk.wait_ms(20);
        talk.server_hears();
        talk.response();
        talk.wait_ms(100);
        talk.server_fin();
        talk.client_hears();
        talk.client_fin();
        CHECK(Found(file).events.back().peer_port == 50000);
    }
}

TEST_CASE("of one direction alone nothing is said", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    (GENERATE(true, false) ? talk.client_seen : talk.server_seen) = false;
    cross(talk, 0.01, 20);
    talk.request();
    talk.wait_ms(0.1);
    talk.server_fin();
    talk.wait_ms(1);
    talk.client_hears();
    talk.client_fin();
    talk.server_hears();
    talk.server_acks();
    const Found found(file);
    CHECK(found.said().empty());
    CHECK(found.kinds.empty());
    CHECK(found.unclassified == 0);
    CHECK(found.facts().gaps.one_direction == 1);
    CHECK(found.feed->missing() == 1);
}

TEST_CASE("what the capture dropped is counted, and marks the verdict", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    talk.open();
    talk.request();
    talk.wait_ms(20);
    SECTION("an answer")
    {
        talk.server_hears();
        talk.unseen_response(500);
        talk.client_hears();
        talk.client_acks();
        talk.wait_ms(5000);
        talk.request();
        talk.wait_ms(0.1);
        talk.server_fin();
        talk.wait_ms(1);
        talk.client_hears();
        talk.client_fin();
        const Found found(file);
        CHECK(found.said() == "keepalive_race/fin_crossed proven incomplete");
        CHECK(found.facts().gaps.missing == 1);
    }
    SECTION("the upstream's FIN: nobody knows who closed")
    {
        talk.server_hears();
        talk.response();
        talk.wait_ms(0.1);
        talk.client_hears();
        talk.client_acks();
        talk.wait_ms(5000);
        talk.unseen_response(1);
        talk.client_hears();
        talk.client_fin();
        const Found found(file);
        CHECK(found.said().empty());
        CHECK_FALSE(found.upstream.idle_timeout.timeout());
        CHECK(found.upstream.kept_idle == 0);
        CHECK(found.facts().gaps.missing == 1);
    }
    SECTION("a request")
    {
        talk.server_hears();
        talk.response();
        talk.wait_ms(1);
        talk.client_hears();
        talk.client_seen = false;
        talk.request();
        talk.client_seen = true;
        talk.wait_ms(20);
        talk.server_hears();
        talk.server_fin();
        talk.client_hears();
        talk.client_fin();
        const Found found(file);
        CHECK(found.said().empty());
        CHECK(found.facts().gaps.missing == 1);
    }
}

TEST_CASE("segments out of order, and a FIN behind a hole", "[capture]")
{
    CaptureFile file;
    Talk talk(file);
    talk.open();
    talk.request();
    talk.wait_ms(20);
    talk.server_hears();
    talk.server_seen = false;
    talk.response(); // comes later
    talk.server_seen = true;
    talk.response("the rest of it");
    talk.server_fin();
    talk.wait_ms(1);
    const auto packet = ipv4(
        talk.server_address, talk.client_address,
        tcp({80, 40000, 901'001, static_cast<std::uint32_t>(1001 + Talk::default_request.size()), TCP_FLAG_BIT_ACK},
            Talk::default_response));
    file.add(talk.now_ns, ethernet(0x0800, packet));
    talk.wait_ms(1);
    talk.client_hears();
    talk.client_fin();
    const Found found(file);
    CHECK(found.said().empty());
    CHECK(found.feed->missing() == 0);
    CHECK(found.events.back().bytes_received == Talk::default_response.size() + 14);
    CHECK(found.upstream.counts.complete_closes == 1);
}

TEST_CASE("a port that is used again is another connection", "[capture]")
{
    CaptureFile file;
    for (const std::uint32_t seq : {1000U, 4'000'000'000U}) {
        Talk talk(file, 40000, seq);
        talk.now_ns += seq == 1000 ? 0 : 10'000 * ms;
        talk.open();
        talk.exchange();
        talk.wait_ms(100);
        talk.client_fin();
        talk.wait_ms(20);
        talk.server_hears();
        talk.server_fin();
        talk.wait_ms(1);
        talk.client_hears();
        talk.client_acks();
    }
    const Found found(file);
    CHECK(found.upstream.counts.opened == 2);
    CHECK(found.upstream.counts.closed == 2);
    CHECK(found.upstream.counts.idle_closes_by_local == 2);
    CHECK(found.feed->missing() == 0);
}

TEST_CASE("where it was taken", "[capture]")
{
    using Place = TakenAt;
    SECTION("by the handshakes' times")
    {
        const auto [near_ms, far_ms, place] = GENERATE(table<double, double, Place>({{0.02, 20, Place::client},
                                                                                     {20, 0.02, Place::server},
                                                                                     {9, 11, Place::between},
                                                                                     {0.01, 0.02, Place::unknown}}));
        CaptureFile ethernet_file;
        for (std::uint16_t port = 40000; port < 40003; ++port) {
            Talk talk(ethernet_file, port);
            talk.now_ns += port * 100 * ms;
            talk.open(far_ms, near_ms);
        }
        const Found found(ethernet_file);
        CHECK(found.facts().vantage.place == place);
        CHECK(found.facts().vantage.sure == (place != Place::unknown));
        if (place == Place::server) {
            REQUIRE(found.facts().vantage.host);
            CHECK(found.facts().vantage.host->address[3] == 2);
        }
    }
    SECTION("by routers passed, where no handshake is captured")
    {
        CaptureFile ethernet_file;
        Talk talk(ethernet_file);
        talk.server_left = 61;
        talk.request();
        talk.server_hears();
        talk.response();
        const Found found(ethernet_file);
        CHECK(found.facts().vantage.place == Place::client);
        CHECK_FALSE(found.facts().vantage.sure);
    }
    SECTION("by those that lead to others, if a host speaks with itself as well")
    {
        CaptureFile any(276);
        for (std::uint16_t port = 40000; port < 40003; ++port) {
            const std::uint8_t answers = port == 40000 ? 0 : 4;
            any.add(capture_epoch_ns, sll2(4, 2, ipv4(1, 2, tcp({port, 80, 10, 0, TCP_FLAG_BIT_SYN}, ""))));
            any.add(capture_epoch_ns,
                    sll2(answers, 2, ipv4(2, 1, tcp({80, port, 20, 11, TCP_FLAG_BIT_SYN | TCP_FLAG_BIT_ACK}, ""))));
            any.add(capture_epoch_ns, sll2(4, 2, ipv4(1, 2, tcp({port, 80, 11, 21, TCP_FLAG_BIT_ACK}, ""))));
        }
        CHECK(Found(any).facts().vantage.place == Place::client);
    }
    SECTION("by the kernel's word")
    {
        CaptureFile any(276);
        const auto [asks, answers, place] = GENERATE(table<std::uint8_t, std::uint8_t, Place>(
            {{4, 0, Place::client}, {0, 4, Place::server}, {4, 4, Place::both}, {0, 0, Place::between}}));
        any.add(capture_epoch_ns, sll2(asks, 2, ipv4(1, 2, tcp({40000, 80, 10, 0, TCP_FLAG_BIT_SYN}, ""))));
        any.add(capture_epoch_ns + 1000,
                sll2(answers, 2, ipv4(2, 1, tcp({80, 40000, 20, 11, TCP_FLAG_BIT_SYN | TCP_FLAG_BIT_ACK}, ""))));
        any.add(capture_epoch_ns + 2000, sll2(asks, 2, ipv4(1, 2, tcp({40000, 80, 11, 21, TCP_FLAG_BIT_ACK}, ""))));
        const Found found(any);
        CHECK(found.facts().vantage.place == place);
        CHECK(found.facts().vantage.sure);
    }
}

TEST_CASE("events come in the order in which they happened, whenever that shows", "[capture]")
{
    CaptureFile file;
    Talk reset(file, 40000);
    Talk acked_late(file, 40001);
    Talk acked(file, 40002);
    std::uint64_t now_ns = capture_epoch_ns;
    for (Talk* talk : {&reset, &acked_late, &acked}) {
        talk->now_ns = now_ns;
        talk->open();
        talk->exchange();
        now_ns = talk->now_ns + 100 * ms;
    }
    const auto after = [&](Talk& talk, std::uint64_t n) -> Talk& {
        talk.now_ns = now_ns + n * ms;
        return talk;
    };
    after(reset, 0).server_reset();
    after(acked_late, 1).server_fin();
    after(acked, 2).server_fin();
    acked.client_hears();
    acked.client_acks();
    acked_late.client_hears();
    after(acked_late, 40).client_fin();
    after(acked, 10'000).client_fin();

    const Found found(file);
    std::vector<int> closed;
    for (std::size_t i = 0; i < found.events.size(); ++i) {
        const event& e = found.events[i];
        if (e.kind == EVENT_PEER_FIN || e.kind == EVENT_PEER_RESET)
            closed.push_back(e.local_port);
        CHECK((i == 0 || found.events[i - 1].timestamp_ns <= e.timestamp_ns));
    }
    CHECK(closed == std::vector<int>{40000, 40001, 40002});
}

TEST_CASE("beyond its room the connection that was quiet for longest is given up, and counted", "[capture]")
{
    std::vector<event> events;
    Follower follower([&](const event& e) { events.push_back(e); }, 4);
    CaptureFile file;
    for (std::uint16_t port = 40000; port < 40006; ++port)
        Talk(file, port).open();
    CaptureReader reader(input_of(file.bytes()));
    while (const auto segment = reader.next())
        follower.take(*segment);
    follower.finish();
    CHECK(events.size() == 6);
    CHECK(follower.counts().losses.by_place[LOSS_TABLE_FULL] == 2);
    CHECK(follower.counts().connections_begun == 6);
}
