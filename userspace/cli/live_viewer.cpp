// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/live_viewer.h"

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <map>
#include <utility>

#include <fmt/format.h>

#include "cli/terminal.h"
#include "core/classify.h"
#include "core/software.h"
#include "core/units.h"
#include "sink/facts.h"

namespace finrace {

namespace {

constexpr std::uint64_t drawn_every_ns = 250 * ns_per_ms;
constexpr std::uint64_t counted_every_ns = 1000 * ns_per_ms;
constexpr std::uint64_t sampled_every_ns = 2000 * ns_per_ms;
/// Of one CPU's time, sampling takes at most one part in so many: a host may have a hundred thousand sockets.
constexpr std::uint64_t sampling_share = 20;
/// What a terminal sends for one key comes at once.
constexpr std::uint64_t escape_settles_ns = 50 * ns_per_ms;
constexpr std::size_t longest_filter = 100; ///< bytes

} // namespace

Sighting sighting_of(const Judged& judged, const Feed& feed)
{
    return {.judged = judged.e,
            .last = judged.last,
            .verdict = *judged.classification.verdict,
            .outcome = judged.outcome,
            .idle_timeout = judged.upstream.idle_timeout.timeout(),
            .process_name = process_name(judged.e.connection, feed.names())};
}

LiveViewer::LiveViewer(Stream& stream, LiveLoop& loop, const Filter& filter)
    : stream_(stream), loop_(loop), filter_(filter), paint_(shows_colours(stdout)),
      tells_netns_(loop.facts().backend == "trace"), began_ns_(loop.now_ns()), traffic_(began_ns_)
{
    terminal_.emplace(stream);
    terminal_->look_who_is_in_front();
    loop.watch_input(terminal_->descriptor(), [this] { on_input(); });
}

void LiveViewer::on_event(const event& e)
{
    queue_.follow(e);
    traffic_.follow(e);
}

void LiveViewer::on_verdict(const Judged& judged)
{
    queue_.add(sighting_of(judged, loop_));
}

bool LiveViewer::on_tick()
{
    const std::uint64_t now_ns = loop_.now_ns();
    terminal_->look_who_is_in_front();
    if (now_ns >= pressed_ns_ + escape_settles_ns)
        for (const Key& key : keyboard_.settle())
            press(key);
    for (Sighting& sighting : queue_.take_ready(now_ns))
        list_.add(std::move(sighting), now_ns);
    show(list_.take(now_ns));
    stream_.flush(); // what waits keeps the lower lines from being drawn
    if (terminal_->in_front()) {
        sample(now_ns);
        draw(now_ns);
    }
    stream_.flush();
    return !ended_ && !stream_.closed_by_reader();
}

std::vector<std::string> LiveViewer::finish()
{
    const std::uint64_t now_ns = loop_.now_ns();
    for (Sighting& sighting : queue_.take_all())
        list_.add(std::move(sighting), now_ns);
    show(list_.take_all(now_ns));
    terminal_.reset();
    stream_.drain(std::chrono::seconds(1));
    std::vector<std::string> left_out;
    if (list_.kept() + list_.forgotten() > 0)
        left_out.push_back(fmt::format("paused: {} verdicts were not shown", list_.kept() + list_.forgotten()));
    if (list_.hidden() > 0)
        left_out.push_back(fmt::format("{} verdicts were left out by a filter", list_.hidden()));
    return left_out;
}

void LiveViewer::show(const std::vector<LiveList::Item>& items)
{
    std::string text;
    for (const LiveList::Item& item : items) {
        if (const auto* sighting = std::get_if<Sighting>(&item))
            text += timeline(*sighting, loop_.clock(), paint_, terminal_width());
        else
            text += folded_text(std::get<Folded>(item), loop_.clock(), paint_);
    }
    terminal_->write_above(text);
    if (!text.empty())
        next_draw_ns_ = 0;
}

void LiveViewer::on_input()
{
    const LiveTerminal::Input input = terminal_->take_input();
    ended_ = ended_ || input.ends;
    pressed_ns_ = loop_.now_ns();
    for (const Key& key : keyboard_.take(input.typed))
        press(key);
    next_draw_ns_ = 0;
}

void LiveViewer::press(const Key& key)
{
    next_draw_ns_ = 0;
    if (key.kind == Key::Kind::redraw) {
        terminal_->forget_drawn();
        return;
    }
    if (typing_) {
        press_while_typing(key);
        return;
    }
    if (key.text == "q")
        ended_ = true;
    else if (key.text == "p" || key.text == " ")
        list_.toggle_pause();
    else if (key.text == "f" || key.text == "/")
        typing_ = list_.filter();
    else if (key.text == "?" || key.text == "h")
        terminal_->write_above(keys_text(paint_));
}

void LiveViewer::press_while_typing(const Key& key)
{
    switch (key.kind) {
    case Key::Kind::enter:
        list_.set_filter(*typing_);
        typing_.reset();
        break;
    case Key::Kind::escape:
        typing_.reset();
        break;
    case Key::Kind::backspace:
        if (!typing_->empty())
            typing_->pop_back();
        break;
    case Key::Kind::erase_line:
        typing_->clear();
        break;
    case Key::Kind::character:
        // What a filter looks in is ASCII.
        if (key.text.size() == 1 && typing_->size() < longest_filter)
            *typing_ += key.text;
        break;
    case Key::Kind::redraw:
        break;
    }
}

void LiveViewer::sample(std::uint64_t now_ns)
{
    const int accounting = loop_.accounting();
    if (!sampling_.valid()) {
        if (now_ns < next_sample_ns_)
            return;
        sampling_ = std::async(std::launch::async, [accounting, with_owners = !filter_.processes.empty()] {
            const std::uint64_t began_ns = WallClock::monotonic_now_ns();
            Sample sample{.sockets = open_sockets(accounting, with_owners), .taken_ns = began_ns, .took_ns = 0};
            sample.took_ns = WallClock::monotonic_now_ns() - began_ns;
            return sample;
        });
        return;
    }
    if (sampling_.wait_for(std::chrono::seconds(0)) != std::future_status::ready)
        return;
    const Sample sample = sampling_.get();
    std::vector<SampledConnection> connections;
    for (const OpenSocket& socket : sample.sockets) {
        if (!filter_.matches_opened(socket.sampled.upstream, socket.pid, socket.process, loop_.names()))
            continue;
        connections.push_back(socket.sampled);
        if (!tells_netns_)
            connections.back().upstream.netns = 0;
    }
    traffic_.take(connections, sample.taken_ns, accounting >= 0);
    sampled_ = true;
    next_sample_ns_ = now_ns + std::max(sampled_every_ns, sample.took_ns * sampling_share);
    next_draw_ns_ = 0;
}

LiveStatus LiveViewer::status(std::uint64_t now_ns)
{
    if (now_ns >= next_count_ns_) {
        lost_ = loop_.counts().lost();
        next_count_ns_ = now_ns + counted_every_ns;
    }
    LiveStatus status{.watched_ns = now_ns - began_ns_,
                      .verdicts = loop_.intake().verdicts(),
                      .unclassified = loop_.intake().unclassified(),
                      .lost = lost_,
                      .not_taken = stream_.dropped(),
                      .paused = list_.paused(),
                      .kept = list_.kept(),
                      .forgotten = list_.forgotten(),
                      .filter = list_.filter(),
                      .hidden = list_.hidden(),
                      .typing = typing_,
                      .upstreams = {}};
    std::map<UpstreamKey, const Upstream*> known;
    loop_.intake().upstreams().for_each([&](const UpstreamKey* key, const Upstream& upstream) {
        if (key != nullptr)
            known.emplace(*key, &upstream);
    });
    static const Upstream nothing_known;
    for (const UpstreamKey& key : traffic_.upstreams())
        known.emplace(key, &nothing_known);
    for (const auto& [key, upstream] : known) {
        const Traffic::Flow flow = traffic_.of(key);
        status.upstreams.push_back(
            {.name = endpoint_text(key.address.data(), key.port, key.family),
             .sampled = sampled_,
             .idle = flow.idle,
             .busy = flow.busy,
             .requests_per_second = flow.requests_per_second,
             .timeout = upstream->idle_timeout.timeout(),
             .exposure =
                 exposure_of(*upstream, upstream->watched_ns(status.watched_ns, now_ns), flow.open, Ends{}).state,
             .races = races_of(upstream->counts)});
    }
    return status;
}

void LiveViewer::draw(std::uint64_t now_ns)
{
    if (now_ns < next_draw_ns_)
        return;
    next_draw_ns_ = now_ns + drawn_every_ns;
    const TerminalSize size = LiveTerminal::size();
    terminal_->draw_below(status_lines(status(now_ns), paint_, size.columns, size.rows));
}

} // namespace finrace
