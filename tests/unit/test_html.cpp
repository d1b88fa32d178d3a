// SPDX-License-Identifier: GPL-2.0-only OR MIT
// The page and its pictures. That it is sound HTML and tells all that the report tells is tests/check_page.py's.
#include <algorithm>
#include <ctime>
#include <string>
#include <vector>

#include <catch2/catch.hpp>

#include "core/diagnosis.h"
#include "sink/html.h"
#include "sink/markup.h"
#include "sink/picture.h"
#include "teach.h"
#include "test_sink_events.h"

using namespace finrace;
using namespace finrace::test;

namespace {

bool says(const std::string& page, const std::string& what)
{
    return page.find(what) != std::string::npos;
}

std::size_t times(const std::string& page, const std::string& what)
{
    std::size_t count = 0;
    for (std::size_t at = page.find(what); at != std::string::npos; at = page.find(what, at + 1))
        ++count;
    return count;
}

Watched watched()
{
    ::setenv("TZ", "UTC", 1);
    ::tzset();
    return {.host_name = "proxy1",
            .source = "backend trace by fentry",
            .observed_ns = 60'000 * ms,
            .tells_outcomes = true,
            .missing_hooks = 0};
}

void judge(Diagnosis& diagnosis, const event& e, const Verdict& verdict, const std::string& process = "nginx")
{
    const Classification classification{.ending = Ending::verdict, .verdict = verdict, .learned_idle_ms = std::nullopt};
    diagnosis.add({.e = e,
                   .last = e,
                   .classification = classification,
                   .outcome = {},
                   .upstream = known_upstream(),
                   .server_end = nullptr},
                  process, 1'769'860'800'000'000'000);
}

Sighting sighting(const event& e)
{
    return {.judged = e,
            .last = e,
            .verdict = race(),
            .outcome = {},
            .idle_timeout = known_upstream().idle_timeout.timeout(),
            .process_name = "nginx"};
}

/// The diagram of a FIN that came so long after the request and leaves so much of it unacknowledged.
std::string drawn(std::uint64_t after_ns, std::uint32_t rtt_us, std::uint32_t unacked)
{
    event e = crossing();
    e.timestamp_ns = e.connection.peer_fin_ns = request_at + after_ns;
    e.srtt_us = rtt_us;
    e.unacked_bytes = e.connection.fin_unacked = unacked;
    return sequence_diagram(sighting(e), "s").svg.take();
}

Pool pool_of(std::initializer_list<std::uint32_t> rests_ms, std::uint32_t closes_ms = 5000)
{
    Pool pool;
    pool.where = UpstreamKey::of(crossing());
    pool.exposure.window_ms = 41;
    for (int i = 0; i < 5; ++i)
        teach(pool.upstream.idle_timeout, closes_ms);
    for (const std::uint32_t ms_rested : rests_ms) {
        pool.upstream.rests.add(ms_rested);
        pool.upstream.longest_reused_idle_ms = std::max(pool.upstream.longest_reused_idle_ms, ms_rested);
    }
    return pool;
}

} // namespace

TEST_CASE("markup escapes what it is given, and closes what it opened", "[html]")
{
    Markup markup;
    markup.open("p", {{"title", "\"><script>"}}).text("<a href='x'>&\x1b[2J\x7f").open("span").text("→");
    CHECK(markup.take() ==
          "<p title=\"&quot;&gt;&lt;script&gt;\">&lt;a href=&#39;x&#39;&gt;&amp;?[2J?<span>→</span></p>\n");
}

TEST_CASE("no name gets into the page as anything but text", "[html]")
{
    Diagnosis diagnosis;
    Verdict verdict = race();
    verdict.message = "</style><script>alert('message')</script>\xff";
    judge(diagnosis, crossing(), verdict, "<img src=x>\"'&");
    Watched what = watched();
    what.host_name = "</title><iframe>";
    what.source = "<object>";
    const std::string page = report_html(diagnosis, what);
    for (const char* element : {"<script", "<img", "<iframe", "<object", "\xff"})
        CHECK(!says(page, element));
    CHECK(times(page, "</style>") == 1);
    CHECK(times(page, "</title>") == 2); // and the picture's
    CHECK(says(page, "&lt;img src=x&gt;&quot;&#39;&amp;"));
    CHECK(says(page, "&lt;/title&gt;&lt;iframe&gt;"));
    CHECK(says(page, "alert(&#39;message&#39;)&lt;/script&gt;?"));
}

TEST_CASE("a page of findings, and where they end", "[html]")
{
    Diagnosis diagnosis;
    event e = crossing();
    for (unsigned i = 0; i < 25; ++i) {
        e.peer_port = static_cast<std::uint16_t>(1000 + i);
        judge(diagnosis, e, race());
    }
    const std::string page = report_html(diagnosis, watched());
    CHECK(times(page, "<article class=\"finding\"") == 20);
    CHECK(times(page, "<svg class=\"sequence\"") == 20);
    CHECK(says(page, "And 5 findings more"));
    for (unsigned i = 0; i < 25; ++i)
        CHECK(says(page, "10.0.0.2:" + std::to_string(1000 + i)));
    CHECK(says(page, "<time datetime=\"2026-01-31T12:00:10.020113000Z\">2026-01-31 12:00:10.020 +00:00</time>"));
    CHECK(!says(report_html(Diagnosis(), watched()), "<article"));
}

TEST_CASE("request and FIN cross on the page where their numbers say that they crossed", "[html]")
{
    const std::string crossed = "class=\"crossing\"";
    CHECK(says(drawn(20'113'000, 40'210, 176), crossed));
    CHECK(!says(drawn(20'113'000, 1000, 0), crossed));
    // The measured round trip says otherwise, or nothing.
    CHECK(says(drawn(90'000'000, 1000, 176), crossed));
    CHECK(!says(drawn(20'113'000, 40'210, 0), crossed));
    CHECK(says(drawn(20'113'000, 0, 176), crossed));
    CHECK(!says(drawn(20'113'000, 0, 0), crossed));
    CHECK(says(drawn(1000, 40'210, 176), crossed));
}

TEST_CASE("the upstream's timer is drawn where it is what closed", "[html]")
{
    const std::string timer = "its timer";
    CHECK(says(drawn(20'113'000, 40'210, 176), timer)); // left 981 ms after the last answer, of 1000
    event e = crossing();
    e.connection.idle_ms = 300;
    CHECK(!says(sequence_diagram(sighting(e), "s").svg.take(), timer));
}

TEST_CASE("a diagram has each step once, in order, within its height, and tells it in words", "[html]")
{
    for (const event& e : {crossing(), crossing_closed(), refused(), closed_unread(), late_segment()}) {
        const Sighting one = sighting(e);
        SequenceDiagram diagram = sequence_diagram(one, "s");
        const std::vector<Moment> moments = moments_of(one);
        REQUIRE(diagram.at.size() == moments.size());
        CHECK(std::is_sorted(diagram.at.begin(), diagram.at.end()));
        CHECK(diagram.at.back() < diagram.height);
        const std::string svg = diagram.svg.take();
        const auto arrows = std::count_if(moments.begin(), moments.end(),
                                          [](const Moment& moment) { return moment.way != Moment::Way::none; });
        CHECK(times(svg, "<polygon") == static_cast<std::size_t>(arrows));
        const std::string words = svg.substr(svg.find("<desc"), svg.find("</desc>") - svg.find("<desc"));
        for (const Moment& moment : moments)
            CHECK(says(words, ": " + moment.what));
        CHECK(!says(svg, "nan"));
    }
    Sighting benched = sighting(crossing());
    benched.verdict.cause = Cause::upstream_benched;
    CHECK(sequence_diagram(benched, "s").height == 0);
}

TEST_CASE("an IPv6 address has room at the head of its line", "[html]")
{
    event e = crossing();
    e.family = 6;
    for (std::uint8_t i = 0; i < 16; ++i)
        e.peer_address[i] = static_cast<std::uint8_t>(0x10 + i);
    const std::string svg = sequence_diagram(sighting(e), "s").svg.take();
    CHECK(says(svg, ">[1011:1213:1415:1617:<"));
    CHECK(says(svg, ">1819:1a1b:1c1d:1e1f]:<"));
    CHECK(says(svg, ">8000<"));
}

TEST_CASE("bars that reach the upstream's close are the requests that die", "[html]")
{
    const std::string dies = "class=\"dies\" fill=\"url(#i-hatch)\"";
    IdlePicture safe = idle_picture(pool_of({100, 2000, 4000, 4000}), "10.0.0.2:8000", "i");
    CHECK(!says(safe.svg.take(), "url(#i-hatch)"));
    CHECK(!safe.some_die);
    CHECK(says(safe.sentence, "Of 4 connections used again, 0 lie in bars that reach"));
    IdlePicture racing = idle_picture(pool_of({100, 4990, 5001}), "10.0.0.2:8000", "i");
    const std::string svg = racing.svg.take();
    CHECK(times(svg, dies) == 1);            // one bar has both
    CHECK(times(svg, "url(#i-hatch)") == 2); // and the end of this host's lane
    CHECK(says(racing.sentence, "Of 3 connections used again, 2 lie in bars that reach"));
    CHECK(says(racing.sentence, "less than 41.0 ms before the close"));
    CHECK(racing.may_go_on);
    CHECK(racing.some_die);
}

TEST_CASE("this host's lane ends where it closes", "[html]")
{
    Pool pool = pool_of({100, 1000});
    for (int i = 0; i < 5; ++i)
        teach(pool.upstream.own_idle_limit, 2000);
    IdlePicture picture = idle_picture(pool, "10.0.0.2:8000", "i");
    CHECK(!picture.may_go_on);
    const std::string svg = picture.svg.take();
    CHECK(says(svg, "this host: closes after 2 s"));
    CHECK(says(svg, "upstream: closes after 5 s"));
}

TEST_CASE("an upstream whose timer is not known has closed none, or some", "[html]")
{
    Pool pool;
    pool.upstream.rests.add(1000);
    CHECK(idle_picture(pool, "10.0.0.2:8000", "i").sentence ==
          "Used again: 1 connection to 10.0.0.2:8000. The upstream: has closed none at rest.");
    pool.upstream.counts.idle_closes_by_peer = 1;
    CHECK(says(idle_picture(pool, "10.0.0.2:8000", "i").svg.take(), "upstream: when it closes is not known"));
}

TEST_CASE("pictures of little that is known", "[html]")
{
    Pool nothing;
    CHECK(!has_idle_times(nothing));
    Pool immediate;
    immediate.upstream.rests.add(0);
    REQUIRE(has_idle_times(immediate));
    for (const Pool& pool : {nothing, immediate, pool_of({}), pool_of({4'294'967'295U}, 4'000'000'000U)}) {
        IdlePicture picture = idle_picture(pool, "a", "i");
        const std::string svg = picture.svg.take();
        CHECK(!says(svg, "nan"));
        CHECK(!says(svg, "inf"));
        CHECK(!picture.sentence.empty());
    }
}
