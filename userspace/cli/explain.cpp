// SPDX-License-Identifier: GPL-2.0-only OR MIT
// finrace explain: what a cause means, what shows it, what to change. All text comes from core's cause table.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "cli/options.h"
#include "cli/terminal.h"
#include "core/cause.h"
#include "core/reason.h"
#include "sink/sentences.h"
#include "sink/text.h"

namespace finrace {

namespace {

constexpr std::size_t widest_page = 100;

void print_text(std::string_view text, std::size_t width)
{
    for (const std::string& line : wrap(text, width - 2))
        fmt::print("  {}\n", line);
}

void print_section(const Paint& paint, std::string_view head, std::string_view text, std::size_t width)
{
    fmt::print("\n{}\n", paint.bold(head));
    print_text(text, width);
}

int explain(const std::string& id)
{
    const Paint paint(shows_colours(stdout));
    const std::size_t width = std::min(terminal_width(), widest_page);
    std::vector<std::string_view> known;
    std::size_t longest = 0;
    for (const CauseText& text : cause_texts()) {
        known.push_back(to_string(text.cause));
        longest = std::max(longest, known.back().size());
    }
    for (const ReasonText& text : reason_texts())
        known.push_back(to_string(text.reason));

    if (id.empty()) {
        for (const CauseText& text : cause_texts())
            fmt::print("{}  {}\n", paint.bold(fmt::format("{:<{}}", to_string(text.cause), longest)), text.title);
        fmt::print("\n{}\n", paint.bold("Why an upstream closed the connection that a race lost (finrace.reason)"));
        for (const ReasonText& text : reason_texts())
            fmt::print("{}  {}\n", paint.bold(fmt::format("{:<{}}", to_string(text.reason), longest)), text.title);
        std::vector<std::string_view> words;
        for (const Word& word : report_words())
            words.push_back(word.word);
        fmt::print("\n{}\n", paint.bold("Other words of reports"));
        print_text(fmt::format("{}", fmt::join(words, ", ")), width);
        fmt::print("\nfinrace explain NAME tells what shows it, and what to change.\n");
        return exit_success;
    }
    std::string name = id;
    std::replace(name.begin(), name.end(), '-', '_');
    for (const Word& word : report_words()) {
        if (word.word == name) {
            fmt::print("{}\n", paint.bold(name));
            print_text(word.meaning, width);
            return exit_success;
        }
    }
    if (const ReasonText* reason = text_of_reason(name)) {
        fmt::print("{}: {}\n", paint.bold(name), reason->title);
        print_section(paint, "What shows it", reason->evidence, width);
        print_section(paint, "What to look at", reason->remedy, width);
        return exit_success;
    }
    std::optional<Cause> cause = cause_from_string(name);
    if (!cause)
        cause = cause_of_variant(name);
    const bool is_status =
        id.size() == 3 && std::all_of(id.begin(), id.end(), [](char c) { return c >= '0' && c <= '9'; });
    const bool is_sentence = id.find(' ') != std::string::npos;
    if (is_status || is_sentence)
        throw UsageError(fmt::format("'{}' is what {}, for any of several causes: finrace diagnose finds out which; "
                                     "known are: {}",
                                     id, is_status ? "a client got" : "a log says", fmt::join(known, ", ")));
    if (!cause)
        throw UsageError(fmt::format("'{}' is no cause and no reason; known are: {}", id, fmt::join(known, ", ")));
    const CauseText& text = text_of(*cause);
    fmt::print("{}: {}\n", paint.bold(to_string(*cause)), text.title);
    print_section(paint, "What happened", text.happened, width);
    print_section(paint, "What shows it", text.evidence, width);
    print_section(paint, "What proxies say", text.proxy_says, width);
    print_section(paint, "What to look at", text.remedy, width);
    return exit_success;
}

} // namespace

void add_explain(CLI::App& program, Action& action)
{
    CLI::App* command = program.add_subcommand("explain", "a cause or a race's reason, its evidence and its remedy");
    auto cause = std::make_shared<std::string>();
    command
        ->add_option("cause", *cause,
                     "its id, as in finrace.cause, a variant's, or a finrace.reason, or another word of a report; all "
                     "are listed without one")
        ->type_name("CAUSE");
    command->footer("Examples:\n"
                    "  finrace explain\n"
                    "  finrace explain keepalive_race");
    command->callback([cause, &action] { action = [cause] { return explain(*cause); }; });
}

} // namespace finrace
