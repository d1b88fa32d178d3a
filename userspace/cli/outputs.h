// SPDX-License-Identifier: GPL-2.0-only OR MIT
// Where a run's records go: any number of places at once, each with a queue of its own, so that none of them waits for
// another, and none of them for a reader. What one of them does not take is counted there, and told.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "sink/datagrams.h"
#include "sink/json.h"
#include "sink/stream.h"

namespace finrace {

struct OutputTarget {
    enum class Kind : std::uint8_t {
        standard_output,
        file,
        stream_socket,   ///< a line for each record
        datagram_socket, ///< a datagram for each record
        syslog,          ///< RFC 5424, a datagram for each record
        journal,         ///< systemd's, with a field for each value
    };
    Kind kind = Kind::standard_output;
    std::string path{}; ///< of the file or the socket

    [[nodiscard]] bool is_socket() const { return kind != Kind::standard_output && kind != Kind::file; }
    /// As parse_output() takes it.
    [[nodiscard]] std::string text() const;
};

/// What --output takes, in words.
inline constexpr const char* output_forms =
    "FILE, - (standard output), unix-stream:PATH, unix-dgram:PATH, syslog[:PATH], journald[:PATH]";

/// Throws UsageError.
OutputTarget parse_output(const std::string& text);

class Outputs {
public:
    /// Throws OutputError, or UsageError if two of them are the same.
    /// `flat`: JSON on one level, but for the journal, whose fields are names of their own.
    explicit Outputs(std::vector<OutputTarget> targets, bool flat = false);

    /// The same, from now on.
    void flatten(bool flat) { flat_ = flat; }
    void put(const Json& record);
    /// Writes as much as is taken without waiting.
    void flush();
    /// So much has been put since that it is worth a system call.
    [[nodiscard]] bool is_due() const;
    /// Flushes all of them for at most `limit`; what then remains counts as dropped.
    void drain(std::chrono::milliseconds limit);
    /// What changed since the last call, on standard error: an output that takes nothing, or takes records again.
    void say_news();
    /// At the end: what was dropped, on standard error.
    void say_dropped() const;

    /// From now on files are written behind: Stream::write_behind(). Throws OutputError.
    void write_behind();

    /// Whether there is another than standard output.
    [[nodiscard]] bool beyond_standard_output() const;
    /// Files are opened anew. One that can't be is tried again, by retry().
    void open_anew();
    /// Files that could not be opened anew are, once in a while, until they are.
    void retry(std::chrono::steady_clock::time_point now);
    /// From now on: file names from the root on. The folders that they were relative to will be gone. Throws
    /// OutputError if such a name leads elsewhere by now.
    void make_absolute();

    /// To be watched, as poll() takes it: room for what waits, and a reader's leaving.
    [[nodiscard]] std::vector<pollfd> awaited() const;
    void reader_left(int descriptor);
    /// All readers have left for good.
    [[nodiscard]] bool ended() const;

    /// The file that is open as `descriptor` too, if one of them is.
    [[nodiscard]] std::optional<std::string> same_file(int descriptor) const;

    /// What will be opened again, or connected to.
    [[nodiscard]] std::vector<std::string> files() const;
    [[nodiscard]] std::vector<std::string> sockets() const;

    [[nodiscard]] std::vector<OutputState> states() const;

private:
    struct Output {
        OutputTarget target;
        std::variant<Stream, Datagrams> to;
        int problem_said = 0;   ///< errno
        int reopen_problem = 0; ///< errno, while records go into the file that was open before
        bool ended_said = false;
        bool overflow_said = false;
        std::uint64_t dropped_before = 0; ///< when say_news() last looked
        std::uint64_t dropped_at_overflow = 0;
    };

    static Output open(OutputTarget target);
    static bool has_ended(const Output& output);
    static void say_news_of(Output& output);
    static void open_anew(Output& output);

    std::vector<Output> outputs_;
    bool flat_;
    std::string line_; ///< the last record's
    std::size_t unflushed_bytes_ = 0;
    std::chrono::steady_clock::time_point retried_at_{};
};

} // namespace finrace
