// SPDX-License-Identifier: GPL-2.0-only OR MIT
#include "source/recording.h"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <type_traits>
#include <utility>

#include <unistd.h>

#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <zlib.h>

#include "core/units.h"

namespace finrace {

namespace {

using Json = nlohmann::json;

constexpr std::string_view header_start = "finrace-recording ";
constexpr char newline = '\n';
constexpr std::size_t longest_header = 1U << 16U;
constexpr std::size_t longest_line = 1U << 17U;        ///< frames are shorter
constexpr std::size_t searched_for_header = 1U << 20U; ///< bytes of a file that does not begin as a recording does
constexpr std::size_t read_bytes = 1U << 18U;
constexpr std::size_t checksum_bytes = sizeof(std::uint32_t);
constexpr std::size_t longest_run = 254;   ///< COBS: bytes in a row without the one that is stuffed
constexpr std::size_t longest_text = 1000; ///< of a header's, in bytes
constexpr std::size_t longest_list = 100;
constexpr const char* byte_order = std::endian::native == std::endian::little ? "little" : "big";

/// A frame's first byte.
constexpr std::size_t longest_path = 4096; ///< PATH_MAX, linux/limits.h

enum class Kind : std::uint8_t { event = 1, tick, clock, process, counts, gap, end, placement };

struct PackedCounts {
    std::uint64_t connections_begun;
    std::uint64_t connections_adopted;
    loss_counters losses;
};
static_assert(std::has_unique_object_representations_v<PackedCounts>);

std::uint32_t checksum(std::string_view bytes)
{
    return static_cast<std::uint32_t>(
        ::crc32(0, reinterpret_cast<const Bytef*>(bytes.data()), static_cast<uInt>(bytes.size())));
}

/// A code byte says how many others follow it until the next newline, which it replaces. Codes and bytes are kept
/// apart from '\n' by exchanging it with 0, which COBS does not write.
std::string stuff(std::string_view bytes)
{
    std::string line;
    line.reserve(bytes.size() + bytes.size() / longest_run + 2);
    std::size_t code_at = line.size();
    line.push_back(0);
    std::size_t run = 0;
    const auto close_run = [&] {
        const auto code = static_cast<char>(run + 1);
        line[code_at] = code == newline ? '\0' : code;
        code_at = line.size();
        run = 0;
    };
    for (const char byte : bytes) {
        if (byte != newline) {
            line.push_back(byte);
            if (++run < longest_run)
                continue;
        }
        close_run();
        line.push_back(0);
    }
    close_run();
    return line;
}

std::optional<std::string> unstuff(std::string_view line)
{
    std::string bytes;
    bytes.reserve(line.size());
    for (std::size_t at = 0; at < line.size();) {
        const char stored = line[at++];
        const std::size_t run = (stored == '\0' ? newline : static_cast<unsigned char>(stored)) - 1U;
        if (run > line.size() - at)
            return std::nullopt;
        bytes.append(line.substr(at, run));
        at += run;
        if (run < longest_run && at < line.size())
            bytes.push_back(newline);
    }
    return bytes;
}

std::string frame(Kind kind, const std::string& payload)
{
    std::string bytes(1, static_cast<char>(kind));
    bytes += payload;
    const std::uint32_t sum = checksum(bytes);
    bytes.append(reinterpret_cast<const char*>(&sum), sizeof(sum));
    return stuff(bytes);
}

template <typename Payload>
std::string frame(Kind kind, const Payload& payload)
{
    static_assert(std::is_trivially_copyable_v<Payload>);
    return frame(kind, std::string(reinterpret_cast<const char*>(&payload), sizeof(payload)));
}

template <typename Payload>
std::optional<Payload> unpack(std::string_view bytes)
{
    Payload payload;
    if (bytes.size() != sizeof(payload))
        return std::nullopt;
    std::memcpy(&payload, bytes.data(), sizeof(payload));
    return payload;
}

/// The process, and each text behind its length; a longer one than any path is cut.
std::string pack(const RecordedPlacement& placement)
{
    std::string bytes(reinterpret_cast<const char*>(&placement.pid), sizeof(placement.pid));
    for (const std::string* text : {&placement.cgroup, &placement.pod_namespace, &placement.pod_name}) {
        const auto size = static_cast<std::uint16_t>(std::min(text->size(), longest_path));
        bytes.append(reinterpret_cast<const char*>(&size), sizeof(size));
        bytes.append(*text, 0, size);
    }
    return bytes;
}

std::optional<RecordedPlacement> unpack_placement(std::string_view bytes)
{
    RecordedPlacement placement{};
    if (bytes.size() < sizeof(placement.pid))
        return std::nullopt;
    std::memcpy(&placement.pid, bytes.data(), sizeof(placement.pid));
    bytes.remove_prefix(sizeof(placement.pid));
    for (std::string* text : {&placement.cgroup, &placement.pod_namespace, &placement.pod_name}) {
        std::uint16_t size = 0;
        if (bytes.size() < sizeof(size))
            return std::nullopt;
        std::memcpy(&size, bytes.data(), sizeof(size));
        bytes.remove_prefix(sizeof(size));
        if (bytes.size() < size || size > longest_path)
            return std::nullopt;
        *text = bytes.substr(0, size);
        bytes.remove_prefix(size);
    }
    return bytes.empty() ? std::optional(std::move(placement)) : std::nullopt;
}

std::string header_line(std::string_view format, std::string_view json)
{
    return fmt::format("{}{} {:08x} {}", header_start, format, checksum(fmt::format("{} {}", format, json)), json);
}

std::string encode_header(const RecordingHeader& header)
{
    Json missing = Json::array();
    for (const Hook& hook : header.facts.missing)
        missing.push_back({{"name", hook.name}, {"purpose", hook.purpose}, {"problem", hook.problem}});
    const Json json = {
        {"finrace", header.version},
        {"run", header.run},
        {"part", header.part},
        {"written_ns", header.written_ns},
        {"host", header.facts.host_name},
        {"backend", header.facts.backend},
        {"attach", header.facts.attach},
        {"tells_outcomes", header.facts.tells_outcomes},
        {"missing_hooks", std::move(missing)},
        {"filter", header.filter},
        {"connections", header.connections},
        {"event", {{"version", FINRACE_EVENT_VERSION}, {"bytes", sizeof(event)}, {"byte_order", byte_order}}}};
    return header_line(std::to_string(recording_format), json.dump(-1, ' ', false, Json::error_handler_t::replace));
}

/// A string of a header: no reader is asked for more room than a name or a sentence takes.
std::string short_text(const Json& json)
{
    std::string text = json;
    text.resize(std::min(text.size(), longest_text));
    return text;
}

/// A count or a time of a header. Throws what JSON's own errors are caught as.
std::uint64_t number(const Json& json)
{
    if (!json.is_number_unsigned() || json.get<std::uint64_t>() >= latest_ns)
        throw Json::type_error::create(302, "no such number", &json);
    return json.get<std::uint64_t>();
}

/// Nothing if it is damaged.
std::optional<RecordingHeader> decode_header(std::string_view line)
{
    constexpr std::size_t sum_digits = 8;
    std::string_view rest = line.substr(header_start.size());
    const std::size_t format_end = rest.find(' ');
    if (line.size() > longest_header || format_end == std::string_view::npos ||
        rest.size() < format_end + 1 + sum_digits + 1)
        return std::nullopt;
    const std::string_view format = rest.substr(0, format_end);
    rest.remove_prefix(format_end + 1 + sum_digits + 1);
    if (line != header_line(format, rest))
        return std::nullopt;
    if (format != std::to_string(recording_format))
        throw OtherVersion(
            fmt::format("its format is another than {}: read it with the finrace that wrote it", recording_format));
    try {
        const Json json = Json::parse(rest);
        const Json& layout = json.at("event");
        if (const std::uint64_t version = number(layout.at("version")); version != FINRACE_EVENT_VERSION)
            throw OtherVersion(fmt::format("its events are of version {}, this finrace reads version {}: read it with "
                                           "the finrace that wrote it",
                                           version, FINRACE_EVENT_VERSION));
        if (layout.at("bytes") != sizeof(event) || layout.at("byte_order") != byte_order)
            throw OtherVersion("it was written by a machine of another kind: read it on such a one");
        RecordingHeader header{.version = short_text(json.at("finrace")),
                               .run = short_text(json.at("run")),
                               .part = static_cast<std::uint32_t>(number(json.at("part"))),
                               .written_ns = static_cast<std::int64_t>(number(json.at("written_ns"))),
                               .facts = {.host_name = short_text(json.at("host")),
                                         .backend = short_text(json.at("backend")),
                                         .attach = short_text(json.at("attach")),
                                         .tells_outcomes = json.at("tells_outcomes"),
                                         .missing = {}},
                               .filter = {},
                               .connections = json.at("connections")};
        if (header.part == 0)
            return std::nullopt;
        for (const Json& hook : json.at("missing_hooks"))
            if (header.facts.missing.size() < longest_list)
                header.facts.missing.push_back({.name = short_text(hook.at("name")),
                                                .attached = false,
                                                .required = false,
                                                .purpose = short_text(hook.at("purpose")),
                                                .problem = short_text(hook.at("problem"))});
        for (const Json& flag : json.at("filter"))
            if (header.filter.size() < longest_list)
                header.filter.push_back(short_text(flag));
        return header;
    } catch (const Json::exception&) {
        return std::nullopt;
    }
}

/// What comes from a file is believed only as far as no reader of it can be led astray.
bool is_sound(const event& e)
{
    const connection& c = e.connection;
    return e.version == FINRACE_EVENT_VERSION && e.kind > 0 && e.kind < EVENT_KINDS &&
           (e.family == 4 || e.family == 6) && e.old_state <= TCP_STATE_NEW_SYN_RECV &&
           e.new_state <= TCP_STATE_NEW_SYN_RECV && c.state <= TCP_STATE_NEW_SYN_RECV &&
           std::max({e.timestamp_ns, e.sent_ns, e.received_ns, c.opened_ns, c.request_ns, c.last_byte_ns, c.peer_fin_ns,
                     c.peer_reset_ns, c.local_close_ns}) < latest_ns;
}

Input opened(const std::string& path)
{
    try {
        return open_input(path);
    } catch (const InputError& error) {
        throw RecordingError(error.what());
    }
}

} // namespace

std::string encode(const RecordingEntry& entry)
{
    return std::visit(
        [](const auto& one) -> std::string {
            using Entry = std::decay_t<decltype(one)>;
            if constexpr (std::is_same_v<Entry, RecordingHeader>)
                return encode_header(one);
            else if constexpr (std::is_same_v<Entry, event>)
                return frame(Kind::event, one);
            else if constexpr (std::is_same_v<Entry, RecordedTick>)
                return frame(Kind::tick, one.now_ns);
            else if constexpr (std::is_same_v<Entry, RecordedClock>)
                return frame(Kind::clock, one.offset_ns);
            else if constexpr (std::is_same_v<Entry, RecordedProcess>)
                return frame(Kind::process, one);
            else if constexpr (std::is_same_v<Entry, RecordedPlacement>)
                return frame(Kind::placement, pack(one));
            else if constexpr (std::is_same_v<Entry, SourceCounts>)
                return frame(Kind::counts, PackedCounts{.connections_begun = one.connections_begun,
                                                        .connections_adopted = one.connections_adopted,
                                                        .losses = one.losses});
            else if constexpr (std::is_same_v<Entry, RecordedGap>)
                return frame(Kind::gap, one.lines);
            else
                return frame(Kind::end, std::uint8_t{one.run});
        },
        entry);
}

Placement placement_of(const RecordedPlacement& recorded)
{
    Placement placement = placement_of(recorded.cgroup);
    placement.pod_namespace = recorded.pod_namespace;
    placement.pod_name = recorded.pod_name;
    return placement;
}

std::optional<RecordingEntry> decode(std::string_view line)
{
    if (line.starts_with(header_start))
        return decode_header(line);
    const std::optional<std::string> whole = unstuff(line);
    if (!whole || whole->size() < 1 + checksum_bytes)
        return std::nullopt;
    const std::string_view bytes = std::string_view(*whole).substr(0, whole->size() - checksum_bytes);
    if (unpack<std::uint32_t>(std::string_view(*whole).substr(bytes.size())) != checksum(bytes))
        return std::nullopt;
    const std::string_view payload = bytes.substr(1);
    switch (static_cast<Kind>(bytes.front())) {
    case Kind::event:
        if (const auto e = unpack<event>(payload); e && is_sound(*e))
            return *e;
        return std::nullopt;
    case Kind::tick:
        if (const auto now_ns = unpack<std::uint64_t>(payload); now_ns && *now_ns < latest_ns)
            return RecordedTick{*now_ns};
        return std::nullopt;
    case Kind::clock:
        if (const auto offset_ns = unpack<std::int64_t>(payload); offset_ns &&
                                                                  *offset_ns < static_cast<std::int64_t>(latest_ns) &&
                                                                  *offset_ns > -static_cast<std::int64_t>(latest_ns))
            return RecordedClock{*offset_ns};
        return std::nullopt;
    case Kind::process:
        if (const auto process = unpack<RecordedProcess>(payload))
            return *process;
        return std::nullopt;
    case Kind::placement:
        if (auto placement = unpack_placement(payload))
            return std::move(*placement);
        return std::nullopt;
    case Kind::counts:
        if (const auto counts = unpack<PackedCounts>(payload))
            return SourceCounts{.connections_begun = counts->connections_begun,
                                .connections_adopted = counts->connections_adopted,
                                .losses = counts->losses};
        return std::nullopt;
    case Kind::gap:
        if (const auto lines = unpack<std::uint64_t>(payload))
            return RecordedGap{*lines};
        return std::nullopt;
    case Kind::end:
        if (const auto run = unpack<std::uint8_t>(payload))
            return RecordedEnd{*run != 0};
        return std::nullopt;
    }
    return std::nullopt;
}

RecordingReader::RecordingReader(const std::string& path, std::function<bool()> stopped)
    : RecordingReader(opened(path), std::move(stopped))
{
}

RecordingReader::RecordingReader(Input input, std::function<bool()> stopped)
    : name_(std::move(input.name)), stopped_(std::move(stopped)), file_(std::move(input.descriptor)),
      buffer_(std::move(input.head))
{
    bool begins_well = false;
    std::size_t searched = 0;
    while (const std::optional<std::string_view> line = next_line()) {
        begins_well = begins_well || line->starts_with(header_start);
        searched += line->size();
        try {
            if (const std::optional<RecordingEntry> entry = decode(*line);
                entry && std::holds_alternative<RecordingHeader>(*entry)) {
                first_ = std::get<RecordingHeader>(*entry);
                return;
            }
        } catch (const OtherVersion& error) {
            throw OtherVersion(fmt::format("cannot read {}: {}", name_, error.what()));
        }
        damaged_ += line->empty() ? 0 : 1;
        if (!begins_well && searched > searched_for_header)
            break;
    }
    const std::string_view rest = std::string_view(buffer_).substr(position_);
    if (begins_well || (cut_short_ && (rest.starts_with(header_start) || header_start.starts_with(rest))))
        throw RecordingError(fmt::format("cannot read {}: its header is damaged, without which nothing of it can be "
                                         "read",
                                         name_));
    if (searched == 0 && rest.empty())
        throw RecordingError(fmt::format("{} is empty: nothing was recorded", name_));
    throw NoRecording(fmt::format("{} is no recording of finrace's: it does not begin with '{}'", name_,
                                  header_start.substr(0, header_start.size() - 1)));
}

/// A line that is whole, without its newline. What is longer than any line is passed over, as one that is damaged.
std::optional<std::string_view> RecordingReader::next_line()
{
    for (std::size_t searched = position_;;) {
        const std::size_t end = buffer_.find(newline, searched);
        if (end != std::string::npos) {
            const std::string_view line = std::string_view(buffer_).substr(position_, end - position_);
            position_ = end + 1;
            if (!std::exchange(in_damage_, false))
                return line;
            searched = position_;
            continue;
        }
        if (at_end_) {
            cut_short_ = position_ < buffer_.size() || in_damage_;
            return std::nullopt;
        }
        buffer_.erase(0, position_);
        position_ = 0;
        if (buffer_.size() > longest_line) {
            damaged_ += in_damage_ ? 0 : 1;
            in_damage_ = true;
            buffer_.clear();
        }
        searched = buffer_.size();
        buffer_.resize(searched + read_bytes);
        ssize_t got = 0;
        do
            got = ::read(file_.get(), buffer_.data() + searched, read_bytes);
        while (got < 0 && errno == EINTR && !(stopped_ && stopped_()));
        if (got < 0 && errno == EINTR)
            got = 0;
        if (got < 0)
            throw RecordingError(fmt::format("cannot read {}: {}", name_, std::strerror(errno)));
        buffer_.resize(searched + static_cast<std::size_t>(got));
        at_end_ = got == 0;
    }
}

std::optional<RecordingEntry> RecordingReader::next()
{
    if (!std::exchange(first_given_, true))
        return first_;
    while (const std::optional<std::string_view> line = next_line()) {
        if (line->empty()) // after a crash, the next run ends the line that it finds
            continue;
        try {
            std::optional<RecordingEntry> entry = decode(*line);
            if (entry && std::holds_alternative<RecordingHeader>(*entry))
                without_header_ = false;
            else if (!entry && line->starts_with(header_start) && !behind_header_) // else it is its second copy
                without_header_ = true;
            if (entry && !without_header_) {
                behind_header_ = std::holds_alternative<RecordingHeader>(*entry);
                return entry;
            }
        } catch (const OtherVersion& error) {
            throw OtherVersion(fmt::format("cannot read on in {}: {}", name_, error.what()));
        }
        ++damaged_;
    }
    return std::nullopt;
}

} // namespace finrace
