// SPDX-License-Identifier: GPL-2.0-only OR MIT
// libFuzzer: a recording that anybody may have written, through all that `finrace run --replay` does with it: reading,
// judging, records. What is mutated is mostly what a line tells, under a checksum that is right: else no mutation would
// come further than that. It needs no corpus: it begins with recordings of its own, in the layout that events have now.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include "cli/parse.h"
#include "source/input.h"
#include "source/recording.h"
#include "tests/fuzz/replay_input.h"
#include "tests/unit/driven_socket.h"

extern "C" {
int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned seed);
std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);
}

namespace {

using finrace::RecordingEntry;

std::vector<std::string> lines_of(std::string_view file)
{
    std::vector<std::string> lines;
    while (!file.empty()) {
        const std::size_t end = std::min(file.find('\n'), file.size());
        lines.emplace_back(file.substr(0, end));
        file.remove_prefix(std::min(end + 1, file.size()));
    }
    return lines;
}

template <typename Payload>
void mutate_bytes(Payload& payload)
{
    static_assert(std::is_trivially_copyable_v<Payload>);
    // It may grow shorter: what is then left of the old bytes stays.
    LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(&payload), sizeof(payload), sizeof(payload));
}

/// Another payload, the checksum to match. A line that is damaged, or a header, is mutated as text.
void mutate_payload(std::string& line)
{
    try {
        if (std::optional<RecordingEntry> entry = finrace::decode(line);
            entry && !std::holds_alternative<finrace::RecordingHeader>(*entry)) {
            std::visit(
                [](auto& one) {
                    if constexpr (std::is_same_v<std::decay_t<decltype(one)>, finrace::RecordedEnd>)
                        one.run = !one.run;
                    else if constexpr (std::is_trivially_copyable_v<std::decay_t<decltype(one)>>)
                        mutate_bytes(one);
                },
                *entry);
            line = finrace::encode(*entry);
            return;
        }
    } catch (const finrace::OtherVersion&) { // as text, then
    }
    std::string text = line;
    const std::size_t size = text.size();
    text.resize(size + 16);
    text.resize(LLVMFuzzerMutate(reinterpret_cast<std::uint8_t*>(text.data()), size, text.size()));
    line = text;
}

void add_life(std::vector<event>& events, std::minstd_rand& random)
{
    finrace::test::DrivenSocket socket(random() % 2 == 0 ? finrace::test::Backend::trace
                                                         : finrace::test::Backend::cgroup);
    socket.wait_ms(random() % 10'000);
    socket.open();
    for (auto exchanges = random() % 3; exchanges > 0; --exchanges) {
        socket.request(100);
        socket.wait_ms(1);
        socket.receive(1000);
        socket.wait_ms(2000);
    }
    socket.request(100);
    switch (random() % 4) {
    case 0:
        socket.fin(0U);
        break;
    case 1:
        socket.fin();
        break;
    case 2:
        socket.reset({.acknowledges = 100U});
        break;
    default:
        socket.receive(10);
    }
    if (socket.open_still())
        socket.close();
    if (socket.open_still())
        socket.local_fin_acknowledged();
    if (socket.open_still())
        socket.fin();
    events.insert(events.end(), socket.events.begin(), socket.events.end());
}

/// A recording of a few lives, and of what the process did of which an outcome is told.
std::string recording(std::minstd_rand& random)
{
    std::vector<event> events;
    for (int lives = 0; lives < 4; ++lives) {
        const std::size_t begin = events.size();
        add_life(events, random);
        for (std::size_t i = begin; i < events.size(); ++i) {
            events[i].family = 4;
            events[i].connection.id = static_cast<std::uint64_t>(lives) + 1;
        }
        event act = events.back();
        for (const event_kind kind : {EVENT_RELEASED, EVENT_TRIED, EVENT_CLIENT_ANSWERED, EVENT_CLIENT_RELEASED})
            if (random() % 2 == 0) {
                act.kind = kind;
                act.thread = 7;
                act.timestamp_ns += 1000;
                events.push_back(act);
            }
    }
    std::stable_sort(events.begin(), events.end(),
                     [](const event& one, const event& other) { return one.timestamp_ns < other.timestamp_ns; });
    std::vector<RecordingEntry> entries;
    entries.emplace_back(finrace::RecordingHeader{
        .version = "0",
        .run = "r",
        .part = 1,
        .written_ns = 1,
        .facts = {.host_name = "proxy", .backend = "trace", .attach = "fentry", .tells_outcomes = true, .missing = {}},
        .filter = {},
        .connections = true});
    entries.push_back(entries.front());
    entries.emplace_back(finrace::RecordedClock{1});
    entries.emplace_back(finrace::RecordedProcess{.pid = 0, .name = {'n', 'g'}});
    entries.emplace_back(
        finrace::RecordedPlacement{.pid = 1, .cgroup = "/a.service", .pod_namespace = "b", .pod_name = "c"});
    for (const event& e : events) {
        entries.emplace_back(e);
        entries.emplace_back(finrace::RecordedTick{e.timestamp_ns + 1});
    }
    entries.emplace_back(finrace::SourceCounts{});
    entries.emplace_back(finrace::RecordedGap{1});
    entries.emplace_back(finrace::RecordedEnd{true});
    std::string file;
    for (const RecordingEntry& entry : entries)
        file += finrace::encode(entry) + '\n';
    return file;
}

} // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    for (const std::string& line : lines_of(text)) {
        try {
            const std::optional<RecordingEntry> entry = finrace::decode(line);
            if (entry && !finrace::decode(finrace::encode(*entry)))
                finrace::test::fail("what was read can't be read again");
        } catch (const finrace::OtherVersion&) {
        }
    }
    if (static bool first = true; std::exchange(first, false)) {
        std::minstd_rand random(1);
        finrace::test::must_replay(recording(random));
    }
    try {
        finrace::test::replay_input(data, size);
    } catch (const finrace::RecordingError&) { // it says so, and ends with 2
    } catch (const finrace::InputError&) {     // it begins as a capture does, and is none
    } catch (const finrace::UsageError&) {     // or as what is compressed
    }
    return 0;
}

std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size, unsigned seed)
{
    std::minstd_rand random(seed);
    const auto below = [&random](std::size_t limit) { return static_cast<std::size_t>(random()) % limit; };
    const auto give = [&](const std::string& file) { return finrace::test::give(file, data, max_size); };
    std::vector<std::string> lines = lines_of({reinterpret_cast<const char*>(data), size});
    if (lines.size() < 3)
        return give(recording(random));
    if (below(8) == 0)
        return LLVMFuzzerMutate(data, size, max_size);
    const std::size_t at = below(lines.size());
    const std::size_t other = below(lines.size());
    switch (below(8)) {
    case 0:
        lines.erase(lines.begin() + static_cast<std::ptrdiff_t>(at));
        break;
    case 1: {
        const std::string copy = lines[at];
        lines.insert(lines.begin() + static_cast<std::ptrdiff_t>(other), copy);
        break;
    }
    case 2:
        std::swap(lines[at], lines[other]);
        break;
    default:
        mutate_payload(lines[at]);
    }
    std::string file;
    for (const std::string& line : lines)
        file += line + '\n';
    return give(file);
}
