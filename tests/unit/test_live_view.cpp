// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The view of a terminal: what is folded, kept and filtered, and the lines below.
#include <cstdlib>
#include <ctime>

#include <catch2/catch.hpp>

#include "sink/live_list.h"
#include "sink/live_view.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;
using Catch::Contains;

namespace {

constexpr std::uint64_t second = LiveList::second_ns;

Sighting sighting(Cause cause = Cause::keepalive_race, std::uint16_t port = 8000)
{
    event e = crossing();
    e.peer_port = port;
    Verdict verdict = race();
    verdict.cause = cause;
    return {.judged = e, .last = e, .verdict = verdict, .outcome = {}, .idle_timeout = {}, .process_name = "nginx"};
}

std::size_t shown_one_by_one(const std::vector<LiveList::Item>& items)
{
    std::size_t count = 0;
    for (const LiveList::Item& item : items)
        count += std::holds_alternative<Sighting>(item) ? 1 : 0;
    return count;
}

std::uint64_t folded(const std::vector<LiveList::Item>& items)
{
    std::uint64_t count = 0;
    for (const LiveList::Item& item : items)
        if (const auto* one = std::get_if<Folded>(&item))
            count += one->count;
    return count;
}

UpstreamStatus upstream(const std::string& name)
{
    return {.name = name,
            .sampled = true,
            .idle = 12,
            .busy = 3,
            .requests_per_second = 104.6,
            .timeout = IdleTimeout{.ms = 5003, .lowest_ms = 5000, .highest_ms = 5010, .samples = 9},
            .exposure = PoolState::safe,
            .races = 0};
}

LiveStatus some_status(std::size_t upstreams)
{
    LiveStatus status;
    status.watched_ns = 125 * second;
    status.verdicts = {{Cause::keepalive_race, 12}, {Cause::stale_reuse, 3}};
    for (std::size_t i = 0; i < upstreams; ++i)
        status.upstreams.push_back(upstream("10.0.0." + std::to_string(i + 1) + ":8000"));
    return status;
}

std::string joined(const std::vector<std::string>& lines)
{
    std::string text;
    for (const std::string& line : lines)
        text += line + "\n";
    return text;
}

const Paint plain(false);

} // namespace

TEST_CASE("a filter looks in cause, upstream and process, whatever the case")
{
    const Sighting one = sighting();
    for (const char* text : {"keepalive", "10.0.0.2:8000", ":8000", "NGINX", "Race", ""})
        CHECK(matches(one, text));
    for (const char* text : {"10.0.0.1", "stale", "haproxy"})
        CHECK_FALSE(matches(one, text));
}

TEST_CASE("what a filter leaves out is counted")
{
    LiveList list;
    list.set_filter("stale");
    list.add(sighting(), second);
    list.add(sighting(Cause::stale_reuse), second);
    CHECK(shown_one_by_one(list.take(second)) == 1);
    CHECK(list.hidden() == 1);
    list.set_filter("");
    list.add(sighting(), second);
    CHECK(shown_one_by_one(list.take(second)) == 1);
    CHECK(list.hidden() == 1);
}

TEST_CASE("a pause keeps what comes, the newest, and counts the rest")
{
    LiveList list;
    list.toggle_pause();
    for (std::size_t i = 0; i < LiveList::most_kept + 5; ++i)
        list.add(sighting(Cause::keepalive_race, static_cast<std::uint16_t>(i)), i * second);
    CHECK(list.take(1'000'000 * second).empty());
    CHECK(list.kept() == LiveList::most_kept);
    CHECK(list.forgotten() == 5);
    list.toggle_pause();
    const std::vector<LiveList::Item> items = list.take(1'000'000 * second);
    CHECK(shown_one_by_one(items) == LiveList::most_kept);
    CHECK(std::get<Sighting>(items.front()).judged.peer_port == 5);
    CHECK(list.kept() == 0);
}

TEST_CASE("at the end of a pause the same is folded as without it")
{
    LiveList list;
    list.toggle_pause();
    for (unsigned i = 0; i < 100; ++i)
        list.add(sighting(), second);
    list.toggle_pause();
    const std::vector<LiveList::Item> items = list.take(10 * second);
    CHECK(shown_one_by_one(items) == LiveList::alike_shown);
    CHECK(folded(items) == 100 - LiveList::alike_shown);
}

TEST_CASE("many alike in a second become one line, at its end")
{
    LiveList list;
    for (unsigned i = 0; i < 1000; ++i)
        list.add(sighting(), second + i);
    list.add(sighting(Cause::stale_reuse), second + 1000);
    std::vector<LiveList::Item> items = list.take(second + 2000);
    CHECK(shown_one_by_one(items) == LiveList::alike_shown + 1);
    CHECK(folded(items) == 0);
    CHECK(list.take(2 * second - 1).empty());
    items = list.take(2 * second);
    REQUIRE(items.size() == 1);
    const auto& line = std::get<Folded>(items.front());
    CHECK(line.count == 1000 - LiveList::alike_shown);
    CHECK(line.cause == Cause::keepalive_race);
    CHECK(line.where.port == 8000);
    ::setenv("TZ", "UTC", 1);
    ::tzset();
    CHECK(folded_text(line, WallClock(0), plain) ==
          "00:00:01.000  keepalive_race  997 more like it from 10.0.0.2:8000 in this second, folded\n\n");
    list.add(sighting(), 3 * second);
    CHECK(shown_one_by_one(list.take(3 * second)) == 1);
}

TEST_CASE("a flood of many kinds takes few lines as well, and loses no count")
{
    LiveList list;
    constexpr unsigned all = 5000;
    for (unsigned i = 0; i < all; ++i)
        list.add(sighting(Cause::connect_refused, static_cast<std::uint16_t>(i % 2000)), second);
    const std::vector<LiveList::Item> items = list.take_all(second);
    CHECK(shown_one_by_one(items) == LiveList::most_shown_all);
    CHECK(items.size() == LiveList::most_shown_all + LiveList::most_folded + 1);
    CHECK(folded(items) == all - LiveList::most_shown_all);
    CHECK_THAT(folded_text(std::get<Folded>(items.back()), WallClock(0), plain),
               Contains("other causes and upstreams"));
}

TEST_CASE("the lines below, at 80 columns")
{
    LiveStatus status = some_status(2);
    status.upstreams[1].exposure = PoolState::exposed;
    status.upstreams[1].races = 12;
    CHECK(joined(status_lines(status, plain, 80, 24)) ==
          "02:05  12 keepalive_race, 3 stale_reuse         p pause  f filter  q end  ? keys\n"
          "upstream        idle   busy   req/s  timeout          exposure    races\n"
          "10.0.0.2:8000     12      3     105  5.00 s ±5 ms     exposed        12\n"
          "10.0.0.1:8000     12      3     105  5.00 s ±5 ms     safe            0\n");
}

TEST_CASE("a line says what is not known")
{
    LiveStatus status = some_status(1);
    status.upstreams[0] = {.name = "10.0.0.1:8000"};
    CHECK_THAT(joined(status_lines(status, plain, 80, 24)),
               Contains("10.0.0.1:8000      -      -       -  -                unknown         0\n"));
}

TEST_CASE("the lines below fit any terminal, and say how many are left out")
{
    LiveStatus status = some_status(30);
    status.upstreams.push_back(upstream("[2001:db8:aaaa:bbbb:cccc:dddd:eeee:ffff]:65535"));
    status.upstreams.back().exposure = PoolState::exposed;
    status.upstreams.back().races = 99999;
    status.lost = 1234;
    status.paused = true;
    status.filter = "10.0.0.1";
    for (const bool typing : {false, true}) {
        status.typing = typing ? std::optional<std::string>(std::string(100, 'x')) : std::nullopt;
        for (const bool colours : {false, true})
            for (std::size_t width = 1; width <= 200; ++width)
                for (const std::size_t height : {1U, 5U, 10U, 12U, 24U, 60U}) {
                    const std::vector<std::string> lines = status_lines(status, Paint(colours), width, height);
                    REQUIRE(!lines.empty());
                    REQUIRE(lines.size() <= most_status_lines(height));
                    for (const std::string& line : lines)
                        REQUIRE(columns(line) <= width);
                }
    }
    status.typing.reset();
    CHECK_THAT(joined(status_lines(status, plain, 80, 24)), Contains("and 26 more\n"));
    const std::vector<std::string> narrow = status_lines(status, plain, 40, 10);
    REQUIRE(narrow.size() == 3);
    CHECK_THAT(narrow[0], Contains("PAUSED 0 new") && Contains("1234 lost"));
    CHECK_THAT(narrow[1], Contains("exposed     99999")); // the worst, whatever its name's length
    CHECK(narrow[2] == "and 30 more");
    CHECK(status_lines(status, plain, 40, 5).size() == 1);
}

TEST_CASE("a filter that is typed stands in the last line, and steers no terminal")
{
    LiveStatus status = some_status(1);
    status.typing = "a\x1b[2J";
    CHECK(status_lines(status, plain, 80, 24).back() == "filter: a?[2J_");
    CHECK(status_lines(status, plain, 80, 5) == std::vector<std::string>{"filter: a?[2J_"});
}

TEST_CASE("colours tell the exposed and the safe")
{
    LiveStatus status = some_status(1);
    CHECK_THAT(joined(status_lines(status, Paint(true), 80, 24)), Contains("\x1b[32msafe"));
    status.upstreams[0].exposure = PoolState::exposed;
    CHECK_THAT(joined(status_lines(status, Paint(true), 80, 24)), Contains("\x1b[1;31mexposed"));
    status.lost = 3;
    CHECK_THAT(joined(status_lines(status, Paint(true), 80, 24)), Contains("\x1b[1;31m3 lost"));
}

TEST_CASE("a text is cut by columns, colours and all")
{
    CHECK(cut("abc", 3) == "abc");
    CHECK(cut("abcd", 3) == "ab…");
    CHECK(cut("a→bc", 3) == "a→…");
    CHECK(cut("abc", 0).empty());
    CHECK(columns(cut(Paint(true).red("abcdef") + "ghi", 4)) == 4);
    CHECK_THAT(cut(Paint(true).red("abcdef") + "ghi", 4), Catch::EndsWith("…\x1b[0m"));
}
