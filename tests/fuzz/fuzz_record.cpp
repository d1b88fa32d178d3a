// SPDX-License-Identifier: GPL-2.0-only OR MIT
// libFuzzer: rows of a fleet's store, which any host may have written, through what makes a report of them.
#include <cstdint>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

#include "sink/clock.h"
#include "sink/record_reader.h"
#include "sink/timeline.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size)
{
    using namespace finrace;
    const nlohmann::json row = nlohmann::json::parse(data, data + size, nullptr, false);
    if (!row.is_object())
        return 0;
    const FlatRecord record(row);
    const event e = event_of(record, record.number("at_ns"));
    if (const auto verdict = verdict_of(record)) {
        const std::string text = timeline({.judged = e,
                                           .last = e,
                                           .verdict = *verdict,
                                           .outcome = outcome_of(record),
                                           .idle_timeout = {},
                                           .process_name = record.text("process.executable.name")},
                                          WallClock(0), Paint(false), 80);
        for (const unsigned char c : text)
            if ((c < ' ' && c != '\n') || c == 0x7f)
                __builtin_trap(); // a terminal would obey it
    }
    return 0;
}
