// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "cli/stored_feed.h"

#include <algorithm>
#include <csignal>
#include <utility>

#include <fmt/format.h>

#include "cli/capture_feed.h"
#include "cli/parse.h"
#include "cli/replay.h"

namespace finrace {

namespace {

volatile std::sig_atomic_t told_to_end = 0;

/// Once: who insists ends it at once.
void end_on(int signal)
{
    struct sigaction action {};
    action.sa_handler = [](int) { told_to_end = 1; };
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    ::sigaction(signal, &action, nullptr);
}

/// What was meant, perhaps, by the name of a file that can't be read.
std::string hint_of(const std::string& path)
{
    try {
        parse_duration(path);
        return fmt::format("; to watch for so long: --for {}", path);
    } catch (const UsageError&) { // none
    }
    try {
        parse_address_pattern(path);
        return fmt::format("; to choose an upstream: --upstream {}", path);
    } catch (const UsageError&) { // none
    }
    return {};
}

Input opened(const std::string& path)
{
    try {
        return open_input(path);
    } catch (const InputError& error) {
        throw InputError(error.what() + hint_of(path));
    }
}

} // namespace

bool is_told_to_end()
{
    return told_to_end != 0;
}

const std::vector<CaptureFacts>& StoredFeed::captures() const
{
    static const std::vector<CaptureFacts> no_captures;
    return no_captures;
}

std::unique_ptr<StoredFeed> open_stored(Filter filter, bool connections, const std::vector<std::string>& paths)
{
    if (std::count(paths.begin(), paths.end(), "-") > 1)
        throw UsageError("- is standard input; name it once");
    end_on(SIGINT);
    end_on(SIGTERM);
    std::vector<Input> inputs;
    inputs.reserve(paths.size());
    for (const std::string& path : paths)
        inputs.push_back(opened(path));
    for (const Input& input : inputs) {
        if (input.kind == InputKind::json)
            throw UsageError(
                fmt::format("{} is JSON: finrace's records and reports tell what was judged, not from what; "
                            "'finrace record --output FILE', or 'run --record FILE' beside them, writes what can "
                            "be judged again",
                            input.name));
        if (input.kind == InputKind::compressed)
            throw UsageError(
                fmt::format("{} is compressed; unpack it first, or on the way: zcat {} | finrace diagnose -",
                            input.name, input.name == "standard input" ? "FILE" : input.name));
    }
    const auto captures = std::count_if(inputs.begin(), inputs.end(),
                                        [](const Input& input) { return input.kind == InputKind::capture; });
    if (captures != 0 && static_cast<std::size_t>(captures) != inputs.size())
        throw UsageError("some of these files are captures and some are not: name captures and recordings apart");
    if (captures != 0)
        return std::make_unique<CaptureFeed>(std::move(filter), std::move(inputs));
    std::vector<std::unique_ptr<RecordingReader>> readers;
    readers.reserve(inputs.size());
    for (Input& input : inputs) {
        try {
            readers.push_back(std::make_unique<RecordingReader>(std::move(input), is_told_to_end));
        } catch (const NoRecording& error) {
            throw NoRecording(fmt::format("{}, and no capture: neither pcap nor pcapng; 'finrace record' "
                                          "writes the one, 'tcpdump -w' the other",
                                          error.what()));
        }
    }
    return std::make_unique<Replay>(std::move(filter), connections, std::move(readers));
}

} // namespace finrace
