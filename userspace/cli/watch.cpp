// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace watch: each verdict as a small timeline, live.
#include <unistd.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cli/live_loop.h"
#include "cli/live_terminal.h"
#include "cli/live_viewer.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "sink/stream.h"
#include "sink/timeline.h"

namespace finrace {

namespace {

constexpr std::chrono::nanoseconds shown_every = std::chrono::milliseconds(100);

struct ViewOptions {
    WatchOptions watch;
    std::optional<std::chrono::nanoseconds> duration{};
};

/// One timeline after the other: what a pipe, a file, or a terminal that can do no more is given.
class Viewer final : public Listener {
public:
    Viewer(Stream& stream, const LiveLoop& loop) : stream_(stream), loop_(loop), paint_(shows_colours(stdout)) {}

    void on_event(const event& e) override { queue_.follow(e); }

    void on_verdict(const Judged& judged) override { queue_.add(sighting_of(judged, loop_)); }

    bool on_tick() override
    {
        show(queue_.take_ready(WallClock::monotonic_now_ns()));
        return !stream_.closed_by_reader();
    }

    [[nodiscard]] std::vector<pollfd> awaited_outputs() const override { return {stream_.awaited()}; }
    void on_reader_left(int /*descriptor*/) override { stream_.reader_left(); }

    void finish()
    {
        show(queue_.take_all());
        stream_.drain(Stream::last_words);
    }

private:
    void show(const std::vector<Sighting>& sightings)
    {
        for (const Sighting& sighting : sightings) {
            std::string text = timeline(sighting, loop_.clock(), paint_, terminal_width());
            text.pop_back(); // the stream ends the last line
            stream_.write(text);
        }
        stream_.flush();
    }

    Stream& stream_;
    const LiveLoop& loop_;
    Paint paint_;
    SightingQueue queue_;
};

void say_tally(const LiveLoop& loop)
{
    std::vector<std::string> parts;
    for (const auto& [cause, count] : loop.intake().verdicts())
        parts.push_back(fmt::format("{} {}", count, to_string(cause)));
    if (parts.empty())
        parts.emplace_back("no verdict");
    if (const std::uint64_t count = loop.intake().unclassified(); count > 0)
        parts.push_back(fmt::format("{} failed without a cause that can be named", count));
    if (const std::uint64_t lost = loop.counts().lost(); lost > 0)
        parts.push_back(fmt::format("{} events or connections lost: this is not all (--ring-bytes)", lost));
    say(fmt::format("{}", fmt::join(parts, ", ")));
}

int watch(const ViewOptions& options)
{
    Stream stream = Stream::to_descriptor(STDOUT_FILENO);
    LiveLoop loop(options.watch, shown_every);
    loop.end_after(options.duration);
    std::vector<std::string> left_out;
    if (LiveTerminal::is_there()) {
        LiveViewer viewer(stream, loop, options.watch.filter);
        loop.run(viewer);
        left_out = viewer.finish();
    } else {
        Viewer viewer(stream, loop);
        loop.run(viewer);
        if (!stream.closed_by_reader())
            viewer.finish();
    }
    if (stream.dropped() > 0)
        say(fmt::format("{} lines could not be shown: the output did not take them", stream.dropped()));
    for (const std::string& sentence : left_out)
        say(sentence);
    say_tally(loop);
    return exit_success;
}

} // namespace

void add_watch(CLI::App& program, Action& action)
{
    CLI::App* command = program.add_subcommand("watch", "each failed request as a timeline, live, for eyes");
    auto options = std::make_shared<ViewOptions>();
    add_watch_options(*command, options->watch);
    add_duration(*command, options->duration, "without it until Ctrl-C");
    command->footer(
        "Times are relative to the request. Ends with 0 on Ctrl-C.\n"
        "\n"
        "On a terminal, lines below the timelines tell how things stand: for the whole, then for each upstream,\n"
        "the worst first. Idle: connections that carry no request; busy: a request has been sent, and no answer\n"
        "to it has begun. req/s: requests begun in the last ten seconds (- by kprobe, and on Linux 5.10 by\n"
        "trace: not known there). Timeout: when the upstream closes idle connections, as learned. Keys: p or\n"
        "space pauses, f or / filters, ? shows them all, q ends. Many verdicts alike in a second are told in one\n"
        "line. Elsewhere, and with TERM=dumb, there are timelines alone.\n"
        "\n"
        "Examples:\n"
        "  finrace watch\n"
        "  finrace watch --upstream 10.0.0.5:8000 --process nginx\n"
        "  finrace watch --for 10m > races.txt");
    command->callback([options, &action] { action = [options] { return watch(*options); }; });
}

} // namespace finrace
