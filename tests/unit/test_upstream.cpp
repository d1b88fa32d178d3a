// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Learned idle timeouts, and the bounded table of upstreams.
#include <catch2/catch.hpp>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <random>
#include <vector>

#include "core/upstream.h"
#include "teach.h"

using namespace finrace;
using finrace::test::teach;

namespace {

IdleTimeoutLearner taught(const std::vector<std::uint32_t>& samples)
{
    IdleTimeoutLearner learner;
    for (const std::uint32_t ms : samples)
        teach(learner, ms);
    return learner;
}

std::uint32_t distance(std::uint32_t a, std::uint32_t b)
{
    return a > b ? a - b : b - a;
}

/// At most 1 % or 10 ms, whichever is more.
bool is_close(std::uint32_t learned, std::uint32_t timer)
{
    return distance(learned, timer) <= std::max(10U, timer / 100);
}

event event_of(std::uint8_t last_octet, std::uint16_t port, std::uint8_t family = 4)
{
    event e{};
    e.peer_address[0] = 10;
    e.peer_address[3] = last_octet;
    e.peer_port = port;
    e.family = family;
    return e;
}

} // namespace

TEST_CASE("nothing is learned from too few samples", "[upstream]")
{
    CHECK(!taught({}).timeout());
    CHECK(!taught({5000}).timeout());
    CHECK(!taught({5000, 5000}).timeout());
    CHECK(taught({5000, 5000, 5000}).timeout());
    CHECK(!taught({5000, 5000, 5000, 900, 20'000, 60'000}).timeout()); // half is not most
}

TEST_CASE("an exact timer", "[upstream]")
{
    const auto timer = GENERATE(200U, 1000U, 5000U, 65'000U, 350'000U, 3'600'000U, 4'000'000'000U);
    const auto timeout = taught(std::vector<std::uint32_t>(5, timer)).timeout();
    REQUIRE(timeout);
    CHECK(timeout->ms == timer);
    CHECK(timeout->spread_ms() == 0);
    CHECK(timeout->samples == 5);
}

TEST_CASE("a timer with an event loop's lateness, from five samples", "[upstream]")
{
    const auto timer = GENERATE(1000U, 2000U, 5000U, 65'000U);
    std::mt19937 random(timer); // NOLINT: a fixed seed, so that a failure comes again
    std::uniform_int_distribution<std::uint32_t> late(0, 10);
    for (int round = 0; round < 200; ++round) {
        IdleTimeoutLearner learner;
        for (int i = 0; i < 5; ++i)
            teach(learner, timer + late(random));
        const auto timeout = learner.timeout();
        REQUIRE(timeout);
        CHECK(is_close(timeout->ms, timer));
        CHECK(timeout->spread_ms() <= 10);
        CHECK(timeout->samples == 5);
    }
}

TEST_CASE("a timer, and closes for other reasons", "[upstream]")
{
    std::mt19937 random(7); // NOLINT
    std::uniform_int_distribution<std::uint32_t> late(0, 10), other(100, 60'000);
    for (int round = 0; round < 200; ++round) {
        std::vector<std::uint32_t> samples;
        for (int i = 0; i < 14; ++i)
            samples.push_back(5000 + late(random));
        for (int i = 0; i < 6; ++i)
            samples.push_back(other(random));
        std::shuffle(samples.begin(), samples.end(), random);
        const auto timeout = taught(samples).timeout();
        REQUIRE(timeout);
        CHECK(is_close(timeout->ms, 5000));
        CHECK(timeout->samples >= 14);
        CHECK(timeout->spread_ms() <= 100); // a restart's closes far below the timer don't widen it
    }
}

TEST_CASE("a timer that is looked at once a second", "[upstream]")
{
    // gunicorn's gthread: 2 s on paper, 2 to 3 s in fact. A wide cluster needs more samples.
    std::mt19937 random(3); // NOLINT
    std::uniform_int_distribution<std::uint32_t> idle(2000, 3000);
    int learned = 0;
    for (int round = 0; round < 200; ++round) {
        IdleTimeoutLearner learner;
        for (int i = 0; i < 20; ++i)
            teach(learner, idle(random));
        if (const auto timeout = learner.timeout()) {
            ++learned;
            CHECK(timeout->ms >= 2000);
            CHECK(timeout->ms <= 3000);
            CHECK(timeout->ms - timeout->spread_ms() <= 2300); // ms and spread reach over the whole range
            CHECK(timeout->ms + timeout->spread_ms() >= 2700);
        }
    }
    CHECK(learned >= 198);
}

TEST_CASE("a timer that keeps to one part of its range for long", "[upstream]")
{
    // gunicorn's gthread under steady load: most closes fall into a fifth of a second, and some before it.
    IdleTimeoutLearner learner;
    for (std::uint32_t i = 0; i < 30; ++i)
        teach(learner, 2220 + 7 * i);
    for (const std::uint32_t idle_ms : {2150U, 2700U, 400U, 60'000U})
        teach(learner, idle_ms);
    const auto timeout = learner.timeout();
    REQUIRE(timeout);
    CHECK(timeout->lowest_ms == 2220);
    CHECK(timeout->highest_ms == 2423);
    CHECK(timeout->below_ms == 70);
    CHECK(timeout->above_ms == 277); // what is far off is another's
    CHECK(timeout->nearness(2080, 11) == Nearness::far);
    CHECK(timeout->reaches(2080, 11));
    CHECK(timeout->reaches(2032, 11));
    CHECK_FALSE(timeout->reaches(2031, 11));
    CHECK(timeout->reaches(2818, 11));
    CHECK_FALSE(timeout->reaches(2819, 11));
}

TEST_CASE("two timers: one of them or none, never something between", "[upstream]")
{
    std::mt19937 random(11); // NOLINT
    std::uniform_int_distribution<std::uint32_t> late(0, 10);
    const auto timers = GENERATE(std::pair(5000U, 60'000U), std::pair(5000U, 6000U), std::pair(2000U, 2900U),
                                 std::pair(5000U, 5400U), std::pair(1000U, 2000U));
    const auto of_first = GENERATE(5, 10, 12, 15, 19);
    std::vector<std::uint32_t> samples;
    for (int i = 0; i < 20; ++i)
        samples.push_back((i < of_first ? timers.first : timers.second) + late(random));
    std::shuffle(samples.begin(), samples.end(), random);
    const auto timeout = taught(samples).timeout();
    CAPTURE(timers.first, timers.second, of_first);
    if (timeout) {
        CAPTURE(timeout->ms, timeout->spread_ms());
        CHECK((is_close(timeout->ms, timers.first) || is_close(timeout->ms, timers.second)));
        // A cluster that reaches over both is claimed only where they are within a tenth of each other.
        CHECK((timeout->spread_ms() <= 10 || timers.second - timers.first <= timers.first / 10));
    }
    if (of_first == 15) { // three in four are most
        REQUIRE(timeout);
        CHECK(is_close(timeout->ms, timers.first));
    }
}

TEST_CASE("noise is no timer", "[upstream]")
{
    std::mt19937 random(5); // NOLINT
    std::uniform_int_distribution<std::uint32_t> even(100, 60'000);
    std::exponential_distribution<double> rare(1.0 / 10'000);
    for (const int count : {3, 4, 5, 6, 8, 10, 20, 50, 128}) {
        int learned = 0;
        for (int round = 0; round < 500; ++round) {
            IdleTimeoutLearner a, b;
            for (int i = 0; i < count; ++i) {
                teach(a, even(random));
                teach(b, 100 + static_cast<std::uint32_t>(rare(random)));
            }
            learned += a.timeout().has_value() + b.timeout().has_value();
        }
        CAPTURE(count);
        CHECK(learned <= 10); // of 1000
    }
}

TEST_CASE("what is learned follows a timer that was changed", "[upstream]")
{
    IdleTimeoutLearner learner = taught(std::vector<std::uint32_t>(500, 5000));
    CHECK(learner.samples() == 128);
    REQUIRE(learner.timeout());
    CHECK(learner.timeout()->ms == 5000);
    for (int i = 0; i < 128; ++i)
        teach(learner, 65'000);
    REQUIRE(learner.timeout());
    CHECK(learner.timeout()->ms == 65'000);
    CHECK(learner.timeout()->samples == 128);
    CHECK(learner.samples() == 128);
    CHECK(learner.idle_times_ms() == std::vector<std::uint32_t>(128, 65'000));
}

TEST_CASE("a timer that many connections outlive, and none meets any more, is forgotten", "[upstream]")
{
    constexpr std::uint64_t minute_ns = 60'000'000'000;
    IdleTimeoutLearner learner;
    std::uint64_t now_ns = minute_ns;
    for (int i = 0; i < 10; ++i)
        learner.learn(5000, now_ns += minute_ns);
    const auto outlived = [&](int count, std::uint32_t rested_ms, std::uint64_t rtt_ms = 0) {
        for (int i = 0; i < count; ++i)
            learner.outlived(rested_ms, rtt_ms, now_ns);
        return !learner.timeout();
    };
    now_ns += 10 * minute_ns;
    CHECK_FALSE(outlived(100, 4000));
    CHECK_FALSE(outlived(100, 5100));      // a busy host's timer may be as late
    CHECK_FALSE(outlived(100, 6000, 500)); // or a far one
    CHECK_FALSE(outlived(19, 30'000));
    SECTION("in a row")
    {
        CHECK(outlived(1, 30'000));
        CHECK(learner.samples() == 0);
        for (int i = 0; i < 3; ++i)
            learner.learn(65'000, now_ns += minute_ns);
        REQUIRE(learner.timeout());
        CHECK(learner.timeout()->ms == 65'000);
    }
    SECTION("but not where it still closes some: there are two of them behind one address")
    {
        learner.learn(5000, now_ns);
        learner.learn(65'000, now_ns + minute_ns); // says nothing of that timer
        now_ns += 10 * minute_ns;
        CHECK_FALSE(outlived(19, 30'000));
        CHECK(outlived(1, 30'000));
    }
    SECTION("nor within minutes: others than its are used as well")
    {
        learner.learn(5000, now_ns);
        now_ns += 10 * minute_ns - 1;
        CHECK_FALSE(outlived(100, 30'000));
        now_ns += 1;
        CHECK(outlived(1, 30'000));
    }
}

TEST_CASE("the answer is not kept beyond the next sample", "[upstream]")
{
    IdleTimeoutLearner learner = taught({5000, 5000});
    CHECK(!learner.timeout());
    teach(learner, 5000);
    REQUIRE(learner.timeout());
    CHECK(learner.timeout()->samples == 3);
    for (int i = 0; i < 10; ++i)
        teach(learner, static_cast<std::uint32_t>(10'000 * (i + 1)));
    CHECK(!learner.timeout());
}

TEST_CASE("what was told of a timer holds until it is learned", "[upstream]")
{
    Upstreams upstreams;
    UpstreamKey known;
    known.port = 8000;
    UpstreamKey later;
    later.port = 8001;
    Upstream& upstream = upstreams.at(known);
    CHECK_FALSE(upstream.idle_timeout.timeout());
    upstreams.tell_timers(
        [](const UpstreamKey& key) { return key.port < 9000 ? std::optional<std::uint32_t>(5000) : std::nullopt; });
    for (const Upstream* told : {&upstream, &upstreams.at(later)}) {
        REQUIRE(told->idle_timeout.timeout());
        CHECK(told->idle_timeout.timeout()->ms == 5000);
        CHECK(told->idle_timeout.timeout()->samples == 0);
        CHECK(told->idle_timeout.timeout()->nearness(5010, 1) == Nearness::at);
    }
    UpstreamKey other;
    other.port = 9000;
    CHECK_FALSE(upstreams.at(other).idle_timeout.timeout());

    for (std::uint64_t n = 1; n <= 3; ++n)
        upstream.idle_timeout.learn(2000, n * 10'000'000'000);
    CHECK(upstream.idle_timeout.timeout()->ms == 2000);
    CHECK(upstream.idle_timeout.timeout()->samples == 3);
    upstreams.tell_timers({});
    CHECK(upstream.idle_timeout.timeout()->ms == 2000);
    CHECK_FALSE(upstreams.at(later).idle_timeout.timeout());
}

TEST_CASE("closes at one instant teach as much as one", "[upstream]")
{
    constexpr std::uint64_t ns_per_ms = 1'000'000;
    constexpr std::uint64_t start_ns = 7'000'000 * ns_per_ms;
    const auto bursts = [&](int count, std::uint64_t apart_ms, std::uint64_t within_ms, std::uint32_t idle_ms) {
        IdleTimeoutLearner learner;
        for (int burst = 0; burst < count; ++burst)
            for (std::uint64_t i = 0; i < 20; ++i)
                learner.learn(idle_ms, start_ns + (burst * apart_ms + i * within_ms / 19) * ns_per_ms);
        return learner;
    };
    SECTION("a process ends: its connections had all rested since one burst of requests")
    {
        CHECK(!bursts(1, 0, 100, 2280).timeout());
        CHECK(!bursts(2, 5000, 100, 2280).timeout());
    }
    SECTION("the boundary: 100 ms are one instant")
    {
        CHECK(!bursts(1, 0, 200, 2280).timeout()); // two instants
        CHECK(bursts(1, 0, 300, 2280).timeout());  // three
        CHECK(!bursts(3, 100, 0, 2280).timeout()); // counted from the first close of an instant
        CHECK(bursts(3, 101, 0, 2280).timeout());
    }
    SECTION("a timer, seen at three instants; of each a few closes are kept")
    {
        const IdleTimeoutLearner learner = bursts(3, 5000, 10, 5000);
        REQUIRE(learner.timeout());
        CHECK(learner.timeout()->ms == 5000);
        CHECK(learner.timeout()->samples == 3);
        CHECK(learner.samples() == 12);
    }
    SECTION("a restart of many connections does not outvote a timer")
    {
        IdleTimeoutLearner learner;
        for (std::uint32_t i = 0; i < 5; ++i)
            learner.learn(5000, start_ns + i * 1000 * ns_per_ms);
        for (std::uint32_t i = 0; i < 100; ++i)
            learner.learn(1000 + 37 * i, start_ns + 9000 * ns_per_ms);
        REQUIRE(learner.timeout());
        CHECK(learner.timeout()->ms == 5000);
        CHECK(learner.timeout()->samples == 5);
    }
    SECTION("of each instant the shortest and the longest are kept, whenever they come")
    {
        // gunicorn's threads look once a second, and close what has rested longest first.
        IdleTimeoutLearner learner;
        const auto look = [&](std::uint64_t number) {
            for (const std::uint32_t idle_ms : {2690U, 2691U, 2692U, 2693U, number % 2 == 0 ? 2390U : 2090U, 2710U})
                learner.learn(idle_ms, start_ns + number * 4000 * ns_per_ms);
        };
        for (std::uint64_t number = 0; number < 9; ++number)
            look(number);
        CHECK(learner.samples() == 36);
        CHECK(!learner.timeout()); // by the longest alone it would be a timer of 2.7 s
        look(9);
        REQUIRE(learner.timeout());
        CHECK(learner.timeout()->lowest_ms == 2090);
        CHECK(learner.timeout()->highest_ms == 2710);
    }
    SECTION("an upstream that closes all the time keeps its instants apart")
    {
        IdleTimeoutLearner learner;
        for (std::uint64_t i = 0; i < 10'000; ++i)
            learner.learn(5000, start_ns + i * ns_per_ms);
        REQUIRE(learner.timeout());
        CHECK(learner.timeout()->samples >= 32);
        CHECK(learner.samples() == 128);
    }
}

TEST_CASE("upstreams on loopback are one network namespace's each", "[upstream]")
{
    const auto in = [](std::uint32_t netns, std::uint8_t first, std::uint8_t last, std::uint8_t family = 4) {
        event e = event_of(1, 80, family);
        std::fill(std::begin(e.peer_address), std::end(e.peer_address), std::uint8_t{0});
        e.peer_address[0] = first;
        e.peer_address[family == 4 ? 3 : 15] = last;
        e.netns = netns;
        return UpstreamKey::of(e);
    };
    CHECK(in(1, 127, 1) != in(2, 127, 1));
    CHECK(in(1, 127, 1) == in(1, 127, 1));
    CHECK(in(1, 0, 1, 6) != in(2, 0, 1, 6));
    CHECK(in(1, 0, 2, 6) == in(2, 0, 2, 6));
    CHECK(in(1, 10, 1) == in(2, 10, 1)); // the same host, as far as routing goes
}

TEST_CASE("the grouping key is address, port and family", "[upstream]")
{
    Upstreams upstreams;
    upstreams.at(UpstreamKey::of(event_of(1, 80))).counts.opened = 1;
    upstreams.at(UpstreamKey::of(event_of(1, 81))).counts.opened = 2;
    upstreams.at(UpstreamKey::of(event_of(2, 80))).counts.opened = 3;
    upstreams.at(UpstreamKey::of(event_of(1, 80, 6))).counts.opened = 4;
    CHECK(upstreams.size() == 4);
    CHECK(upstreams.at(UpstreamKey::of(event_of(1, 80))).counts.opened == 1);
    CHECK(upstreams.at(UpstreamKey::of(event_of(1, 80, 6))).counts.opened == 4);
    CHECK(upstreams.size() == 4);

    event local_differs = event_of(1, 80);
    local_differs.local_port = 5555;
    local_differs.local_address[0] = 9;
    CHECK(UpstreamKey::of(local_differs) == UpstreamKey::of(event_of(1, 80)));
}

TEST_CASE("the table of upstreams is bounded, what is beyond shares one entry", "[upstream]")
{
    Upstreams upstreams(3);
    for (std::uint8_t i = 0; i < 10; ++i)
        ++upstreams.at(UpstreamKey::of(event_of(i, 80))).counts.opened;
    CHECK(upstreams.size() == 3);
    ++upstreams.at(UpstreamKey::of(event_of(1, 80))).counts.opened; // known ones stay themselves
    ++upstreams.at(UpstreamKey::of(event_of(9, 80))).counts.opened;

    std::size_t own = 0;
    std::size_t others = 0;
    upstreams.for_each([&](const UpstreamKey* key, const Upstream& upstream) {
        if (key != nullptr) {
            ++own;
            CHECK(upstream.counts.opened == (key->address[3] == 1 ? 2U : 1U));
        } else {
            ++others;
            CHECK(upstream.counts.opened == 8);
        }
    });
    CHECK(own == 3);
    CHECK(others == 1);
}

TEST_CASE("a full table forgets those of which nothing came for an hour", "[upstream]")
{
    constexpr std::uint64_t second_ns = 1'000'000'000;
    Upstreams upstreams(2);
    upstreams.at(UpstreamKey::of(event_of(1, 80)), second_ns);
    upstreams.at(UpstreamKey::of(event_of(2, 80)), 2 * second_ns);
    const std::uint64_t after_ns = second_ns + Upstreams::forgotten_after_ns;
    Upstream& other = upstreams.at(UpstreamKey::of(event_of(3, 80)), after_ns);
    CHECK(upstreams.is_other(other));
    // The next look is a minute later.
    CHECK(upstreams.is_other(upstreams.at(UpstreamKey::of(event_of(3, 80)), after_ns + 59 * second_ns)));
    upstreams.at(UpstreamKey::of(event_of(2, 80)), after_ns + 59 * second_ns);
    CHECK(!upstreams.is_other(upstreams.at(UpstreamKey::of(event_of(3, 80)), after_ns + 60 * second_ns)));
    CHECK(upstreams.size() == 2);
    CHECK(upstreams.at(UpstreamKey::of(event_of(2, 80)), after_ns).newest_ns == after_ns + 59 * second_ns);
}

TEST_CASE("an upstream has been watched since its first event, or an hour", "[upstream]")
{
    constexpr std::uint64_t hour_ns = 3'600'000'000'000;
    Upstreams upstreams;
    const UpstreamKey key = UpstreamKey::of(event_of(1, 80));
    upstreams.at(key, 10 * hour_ns);
    const Upstream& upstream = upstreams.at(key, 11 * hour_ns);
    CHECK(upstream.watched_ns(15 * hour_ns, 15 * hour_ns) == 5 * hour_ns);
    CHECK(upstream.watched_ns(10 * hour_ns + 2, 10 * hour_ns + 2) == hour_ns);
    CHECK(upstream.watched_ns(60, 10 * hour_ns + 2) == 60); // a short run
    CHECK(Upstream{}.watched_ns(60, 10 * hour_ns) == 60);
}

TEST_CASE("no entry for others before there are any", "[upstream]")
{
    Upstreams upstreams(1);
    upstreams.at(UpstreamKey::of(event_of(1, 80)));
    std::size_t visited = 0;
    upstreams.for_each([&](const UpstreamKey* key, const Upstream&) {
        ++visited;
        CHECK(key != nullptr);
    });
    CHECK(visited == 1);
}

TEST_CASE("references to upstreams stay good while others are added", "[upstream]")
{
    Upstreams upstreams;
    Upstream& first = upstreams.at(UpstreamKey::of(event_of(1, 80)));
    for (std::uint16_t port = 1000; port < 4000; ++port)
        upstreams.at(UpstreamKey::of(event_of(2, port)));
    first.counts.closed = 42;
    CHECK(upstreams.at(UpstreamKey::of(event_of(1, 80))).counts.closed == 42);
}
