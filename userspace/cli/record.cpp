// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace record: the raw events to a file, to be judged, or judged again, elsewhere and later.
#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include <CLI/CLI.hpp>
#include <fmt/format.h>

#include "cli/confinement.h"
#include "cli/live_loop.h"
#include "cli/options.h"
#include "cli/recorder.h"

namespace finrace {

namespace {

struct RecordCommand {
    WatchOptions watch;
    RecordOptions record;
    std::optional<std::chrono::nanoseconds> duration;
    bool connections = false;
    bool unconfined = false;
};

/// Lets everything pass, for as long as somebody takes what is recorded.
class Patience final : public Listener {
public:
    explicit Patience(const Recorder& recorder) : recorder_(recorder) {}

    void on_event(const event& /*e*/) override {}
    void on_verdict(const Judged& /*judged*/) override {}
    bool on_tick() override { return !recorder_.closed_by_reader(); }

private:
    const Recorder& recorder_;
};

int record(RecordCommand command)
{
    check_combination(command.watch);
    command.watch.live.follow_accepted = command.connections;
    command.watch.live.report_states = command.connections;
    Recorder recorder(command.record);
    LiveLoop feed(command.watch, LiveLoop::unhurried_tick, &recorder);
    feed.end_after(command.duration);
    if (!command.unconfined)
        confine(
            {.files = recorder.files(), .listed = {PodNames::usual_folder}, .with_rights = [&] { feed.use_rights(); }},
            [&] { return feed.counts_losses(); });
    recorder.write_behind();
    Patience patience(recorder);
    feed.run(patience);
    say(fmt::format("{} events recorded; they make {} verdicts", recorder.events(), feed.intake().verdicts_in_all()));
    say_missing(recorder);
    return exit_success;
}

} // namespace

void add_record(CLI::App& program, Action& action)
{
    CLI::App* command = program.add_subcommand("record", "the raw events to a file, for diagnose and run --replay");
    auto options = std::make_shared<RecordCommand>();
    add_watch_options(*command, options->watch);
    add_record_options(*command, "--output", options->record);
    command->get_option("--output")->required();
    add_duration(*command, options->duration, "without it until Ctrl-C");
    command->add_flag("--connections", options->connections,
                      "what run --connections needs as well: states, and what this host accepts");
    add_confinement_option(*command, options->unconfined);
    command->footer(
        "A recording holds addresses, ports, times, the host's name, processes' names and control groups\n"
        "(container, pod, unit), statuses that clients got, and no other payload. What you tell of idle timers\n"
        "(--idle-timeout) is not in it: tell it again where it is read.\n"
        "\n"
        "Examples:\n"
        "  finrace record --output /var/tmp/finrace.rec --for 10m\n"
        "  finrace diagnose /var/tmp/finrace.rec\n"
        "  finrace run --replay /var/tmp/finrace.rec");
    command->callback([options, &action] { action = [options] { return record(*options); }; });
}

} // namespace finrace
